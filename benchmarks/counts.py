"""Measure the shell: functions executed up to the first loss and the first PNG, lines of code, frequency of personifying words.

    python benchmarks/counts.py            # about a minute
    python benchmarks/counts.py --list     # also list the functions by file

Mathematics, models and data are excluded, and callbacks from the functions. Comprehensions and lambdas count with the function
that contains them; bodies of modules and classes do not count.
"""

import argparse
import ast
import inspect
import io
import json
import re
import runpy
import subprocess
import sys
import tempfile
import threading
import tokenize
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

SRC = Path(__file__).resolve().parents[1] / "src"
MATHEMATICS = {
    *("schedules", "noise", "gaussian", "objectives", "time_samplers", "weightings", "variances", "denoiser", "losses"),
    *("guidance", "clipping", "editing", "likelihood", "samplers", "conditions"),
}
NOT_TRACED = {*MATHEMATICS, "models", "data"}  # and training/callbacks
NOT_SHELL = {*MATHEMATICS, "models", "data", "metrics", "reporting", "interop"}
WORDS = ("told", "said", "says", "asked", "asks", "knows", "wants", "learns", "beside", "anew")
TRAIN = (
    *("trainer=cpu", "trainer.max_steps=1", "validation.every=0", "lr_scheduler.warmup=0", "logger=csv"),
    *("callbacks.samples=null", "callbacks.progress=null"),
)
SAMPLE = ("device=cpu", "n=4", "sampler.steps=2", "save_images=false")


def room(path: Path) -> str:
    """Return the package's top-level module or folder that contains `path`, or the folder of src/ outside the package."""
    parts = path.relative_to(SRC).parts
    return (parts[1] if parts[0] == "diffusion_lab" else parts[0]).removesuffix(".py")


# functions that run ---------------------------------------------------------------------------------------------------


def trace(command: str, last: str, *arguments: str) -> list[str]:
    """Run src/COMMAND.py in a process of its own; return FILE:FUNCTION of each shell function called until `last` returns."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "called.json"
        child = [sys.executable, __file__, "--trace", str(out), last, str(SRC / f"{command}.py"), *arguments]
        done = subprocess.run(child, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"src/{command}.py exited with {done.returncode}:\n{done.stderr[-3000:]}")
        called: list[str] = json.loads(out.read_text())
        return called


def _traced(out: Path, last: str, program: str) -> None:
    """Run `program` under a profiler, in this process and its threads, and write the functions that it calls to `out`."""
    codes: set[CodeType] = set()
    finished = threading.Event()

    def profile(frame: FrameType, event: str, _: Any) -> None:
        if finished.is_set():
            sys.setprofile(None)
        elif event == "call":
            codes.add(frame.f_code)
        elif event == "return" and frame.f_code.co_qualname == last and frame.f_code.co_filename.startswith(str(SRC)):
            finished.set()

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        runpy.run_path(program, run_name="__main__")
    except SystemExit as end:
        if end.code:
            raise
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    if not finished.is_set():
        raise RuntimeError(f"{program} never returned from {last}")
    out.write_text(json.dumps(sorted({name for code in codes if (name := _function(code))})))


def _function(code: CodeType) -> str | None:
    """Return FILE:FUNCTION of a code object of the shell, None for any other and for the bodies of modules and classes."""
    path = Path(code.co_filename)
    if not path.is_relative_to(SRC) or not code.co_flags & inspect.CO_OPTIMIZED:
        return None
    relative = path.relative_to(SRC)
    if room(path) in NOT_TRACED or relative.is_relative_to("diffusion_lab/training/callbacks"):
        return None
    outer = re.split(r"(?:\.<locals>)?\.?<(?:lambda|listcomp|setcomp|dictcomp|genexpr)>", code.co_qualname)[0]
    return f"{relative}:{outer}" if outer else None


def describe(title: str, called: list[str], goal: str, listed: bool) -> str:
    """Return the number of functions and files, by room."""
    files = Counter(name.split(":")[0] for name in called)
    rooms = Counter[str]()
    for name, count in files.items():
        rooms[room(SRC / name)] += count
    lines = [f"{title}: {len(called)} functions in {len(files)} files (goal: {goal})"]
    lines.append("  " + ", ".join(f"{name} {count}" for name, count in rooms.most_common()))
    if listed:
        for file in sorted(files):
            names = sorted(name.split(":")[1] for name in called if name.split(":")[0] == file)
            lines.append(f"  {file} ({len(names)}): {', '.join(names)}")
    return "\n".join(lines)


# lines and words ------------------------------------------------------------------------------------------------------


def lines_of_code(text: str) -> tuple[int, int]:
    """Return (all lines, lines without blank lines, comments and docstrings)."""
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            code.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            ast.get_docstring(node, clean=False) is not None
        ):
            docstring = node.body[0]
            code -= set(range(docstring.lineno, (docstring.end_lineno or docstring.lineno) + 1))
    return len(text.splitlines()), len(code)


def lines(paths: list[Path]) -> str:
    """Return both numbers of lines of some files, summed."""
    total, code = (sum(pair) for pair in zip(*(lines_of_code(p.read_text()) for p in paths), strict=True))
    return f"{total:,} lines, {code:,} without blank lines, comments and docstrings"


def words(paths: list[Path]) -> str:
    """Return how often each word of WORDS occurs in some files, and the rate of all per thousand lines."""
    text = "\n".join(path.read_text() for path in paths)
    counts = Counter(word.lower() for word in re.findall(rf"\b(?:{'|'.join(WORDS)})\b", text, flags=re.IGNORECASE))
    rate = 1000 * counts.total() / len(text.splitlines())
    return f"{rate:.1f} per 1,000 lines ({', '.join(f'{word} {counts[word]}' for word in WORDS)})"


def main() -> None:
    """Print the counts."""
    if sys.argv[1:2] == ["--trace"]:  # the child process of `trace`
        out, last, program = sys.argv[2:5]
        sys.argv = sys.argv[4:]
        _traced(Path(out), last, program)
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--list", action="store_true", help="list the functions by file")
    parser.add_argument("--no-trace", action="store_true", help="lines and words alone, in a second")
    options = parser.parse_args()
    if not options.no_trace:
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            called = trace("train", "diffusion_loss", *TRAIN, f"hydra.run.dir={run}")
            print(describe("train.py to the first loss", called, "45 in 12", options.list), flush=True)
            called = trace("sample", "save_png", f"ckpt={run}", f"out={Path(folder) / 'out'}", *SAMPLE)
            print(describe("sample.py to the first PNG", called, "35 in 9", options.list), flush=True)
    files = sorted(SRC.rglob("*.py"))
    print(f"shell (goal: 4,000): {lines([p for p in files if room(p) not in NOT_SHELL])}")
    print(f"cli/ (goal: 450): {lines([p for p in files if room(p) == 'cli'])}")
    print(f"src/: {lines(files)}\nwords: {words(files)}")


if __name__ == "__main__":
    main()
