'use strict';
const data = JSON.parse(document.getElementById('data').textContent);
const $$ = (selector, root = document) => [...root.querySelectorAll(selector)];
const main = document.querySelector('#runs table');

// tables: a click on a heading sorts, as does the fragment #sort=COLUMN or #sort=-COLUMN ------------------------------------------
function sort(table, column, down) {
  const index = $$('thead th', table).indexOf(column), value = row => row.cells[index].dataset.v;
  const compare = (a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === undefined || y === undefined) return (x === undefined) - (y === undefined); // missing values sort last
    const order = isNaN(x) || isNaN(y) ? x.localeCompare(y, 'en', { numeric: true }) : x - y;
    return down ? -order : order;
  };
  table.tBodies[0].append(...[...table.tBodies[0].rows].sort(compare));
  for (const th of $$('thead th', table)) th.removeAttribute('aria-sort');
  column.setAttribute('aria-sort', down ? 'descending' : 'ascending');
  if (table !== main) return;
  const cards = new Map($$('.grids figure').map(card => [card.dataset.run, card])); // samples follow the order of the runs
  for (const row of table.tBodies[0].rows) document.querySelector('.grids').append(cards.get(row.cells[0].dataset.v));
}
for (const table of $$('table.sortable')) {
  table.tHead.addEventListener('click', event => {
    const column = event.target.closest('th'), down = column?.getAttribute('aria-sort') === 'ascending';
    if (column) sort(table, column, down);
    if (!column || table !== main) return;
    const address = '#sort=' + (down ? '-' : '') + encodeURIComponent(column.dataset.key);
    try { history.replaceState(null, '', address); } catch { /* a frame without an address */ }
  });
}
function sortByFragment() {
  let match = null;
  try { match = decodeURIComponent(location.hash).match(/^#sort=(-?)(.*)$/); } catch { /* not percent-encoded text */ }
  const column = match && main && $$('thead th', main).find(th => th.dataset.key === match[2]);
  if (column) sort(main, column, !!match[1]);
}
['hashchange', 'load'].forEach(event => addEventListener(event, sortByFragment));

// colors by run, or by one of the choices; dashes by sampler --------------------------------------
const styles = {}; // section → {by: index of a choice or -1, keys: values with a color, names: samplers, hidden}
const DASHES = ['', '7 4', '2 3', '9 3 2 3', '1 5'];
const keyOf = (style, series) => style.by < 0 ? String(series.run) : data.runs[series.run].values[style.by];
const shows = (style, series) => !style.hidden.has('key ' + keyOf(style, series)) && !style.hidden.has('name ' + series.name);
const dash = (style, name) => DASHES[style.names.indexOf(name) % DASHES.length];
function color(style, key) {
  const i = style.keys.indexOf(key), n = style.keys.length;
  return n <= 8 ? `var(--c${i})` : `hsl(${Math.round(i * 330 / n)} 65% var(--many))`;
}
function legend(section) {
  const style = styles[section], place = document.querySelector(`.legend[data-of=${section}]`);
  const all = data.charts[section].flatMap(chart => chart.series);
  style.keys = [...new Set(all.map(series => keyOf(style, series)))];
  style.names = [...new Set(all.map(series => series.name))];
  if (style.by >= 0) style.keys.sort((a, b) => a.localeCompare(b, 'en', { numeric: true }));
  place.replaceChildren();
  if (data.choices.length) {
    const [label, select] = [document.createElement('label'), document.createElement('select')];
    ['run', ...data.choices].forEach((name, i) => select.add(new Option(name, i - 1, false, i - 1 === style.by)));
    select.onchange = () => { Object.assign(style, { by: +select.value, hidden: new Set() }); legend(section); };
    place.append(label);
    label.append('Color by ', select);
  }
  const toggle = (id, sign, text) => {
    const button = document.createElement('button');
    button.append(sign, text);
    const update = () => button.setAttribute('aria-pressed', !style.hidden.has(id));
    button.addEventListener('click', () => { style.hidden.delete(id) || style.hidden.add(id); update(); drawAll(section); });
    update();
    place.append(button);
  };
  for (const key of style.keys) {
    const dot = document.createElement('i');
    dot.style.setProperty('--key', color(style, key));
    toggle('key ' + key, dot, style.by < 0 ? data.runs[key].label : key);
  }
  for (const name of style.names.length > 1 ? style.names : []) {
    const svg = node('svg', { width: 26, height: 8, 'aria-hidden': 'true' });
    svg.append(node('path', { class: 'sign', d: 'M0,4H26', 'stroke-dasharray': dash(style, name) }));
    toggle('name ' + name, svg, name);
  }
  drawAll(section);
}

// charts ------------------------------------------------------------------------------------------------------------------
function ticks(low, high, log, wanted) {
  if (log) {
    const decades = Math.log10(high / low), parts = decades > 3 ? [1] : decades > 1.2 ? [1, 3] : [1, 1.5, 2, 3, 5, 7], values = [];
    for (let e = Math.floor(Math.log10(low)); e <= Math.log10(high); e++)
      values.push(...parts.map(m => m * 10 ** e).filter(v => v >= low * .999 && v <= high * 1.001));
    if (values.length > 1) return values;
  }
  const rough = (high - low) / wanted || 1, power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 5, 10].find(m => m * power >= rough * .999), values = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) values.push(i * step);
  return values;
}
const extent = values => values.reduce(([low, high], v) => [Math.min(low, v), Math.max(high, v)], [Infinity, -Infinity]);
const format = v => v >= 1e6 ? +(v / 1e6).toPrecision(3) + 'M' : v >= 1e4 ? +(v / 1e3).toPrecision(3) + 'k' : String(+v.toPrecision(4));
const assign = (element, attributes) => Object.entries(attributes).forEach(pair => element.setAttribute(...pair));
function node(tag, attributes, text = '') {
  const element = document.createElementNS('http://www.w3.org/2000/svg', tag);
  assign(element, attributes);
  element.textContent = text;
  return element;
}
function draw(figure) {
  const style = styles[figure.dataset.of], chart = data.charts[figure.dataset.of][figure.dataset.chart];
  const place = figure.querySelector('.plot'), box = figure.querySelector('input');
  const W = Math.max(place.clientWidth, 200), H = Math.min(300, Math.max(200, W * .62));
  const left = 46, right = 12, top = 10, bottom = 34;
  const shown = chart.series.filter(series => shows(style, series));
  const ys = shown.flatMap(s => s.y).filter(y => y !== null), xs = shown.flatMap(s => s.x);
  place.replaceChildren();
  if (!ys.length) return;
  let [x0, x1, y0, y1] = [...extent(xs), ...extent(ys)];
  box.disabled = y0 <= 0;
  if (box.dataset.touched === undefined) box.checked = y0 > 0 && y1 > 10 * y0;
  const log = box.checked && y0 > 0, logX = chart.points && x0 > 0;
  if (x0 === x1) { x0 = logX ? x0 / 2 : x0 - 1; x1 = logX ? x1 * 2 : x1 + 1; }
  if (logX) { x0 /= 1.15; x1 *= 1.15; }
  if (y0 === y1) { y0 = log ? y0 / 2 : y0 - Math.abs(y0) / 2 - 1e-9; y1 = log ? y1 * 2 : y1 + Math.abs(y1) / 2 + 1e-9; }
  const pad = (y1 - y0) * .04;
  if (log) { const f = (y1 / y0) ** .04; y0 /= f; y1 *= f; } else { y0 = y0 >= 0 && y0 < pad ? 0 : y0 - pad; y1 += pad; }
  const scale = (a, b, p, q, isLog) => v => p + (q - p) * (isLog ? Math.log(v / a) / Math.log(b / a) : (v - a) / (b - a));
  const X = scale(x0, x1, left, W - right, logX), Y = scale(y0, y1, H - bottom, top, log);
  const svg = node('svg', { viewBox: `0 0 ${W} ${H}`, height: H, 'aria-hidden': 'true' });
  for (const v of ticks(y0, y1, log, 5)) {
    svg.append(node('line', { class: 'axis', x1: left, x2: W - right, y1: Y(v), y2: Y(v) }));
    svg.append(node('text', { x: left - 6, y: Y(v) + 4, 'text-anchor': 'end' }, format(v)));
  }
  let free = -Infinity; // left end of the space for the next label
  for (const v of chart.points ? [...new Set(xs)].sort((a, b) => a - b) : ticks(x0, x1, false, W / 90).filter(Number.isInteger)) {
    if (X(v) < free) continue;
    svg.append(node('text', { x: X(v), y: H - bottom + 16, 'text-anchor': 'middle' }, format(v)));
    free = X(v) + 34;
  }
  svg.append(node('text', { x: W - right, y: H - 3, 'text-anchor': 'end' }, chart.axis));
  const lines = shown.map(series => {
    let path = '', gap = true;
    series.x.forEach((x, i) => {
      if (series.y[i] !== null) path += `${gap ? 'M' : 'L'}${X(x).toFixed(1)},${Y(series.y[i]).toFixed(1)}`;
      gap = series.y[i] === null;
    });
    const group = node('g', {}), stroke = color(style, keyOf(style, series)), dashes = dash(style, series.name);
    group.append(node('path', { class: 'line', d: path, style: `stroke:${stroke}`, 'stroke-dasharray': dashes }));
    if (chart.points || series.y.filter(y => y !== null).length === 1) series.x.forEach((x, i) => series.y[i] !== null &&
      group.append(node('circle', { cx: X(x), cy: Y(series.y[i]), r: 3, style: `fill:${stroke}` })));
    svg.append(group);
    return group;
  });
  const mark = node('circle', { r: 4.5, fill: 'none', 'stroke-width': 2 });
  const tip = Object.assign(document.createElement('div'), { className: 'tip' });
  const leave = () => { mark.remove(); tip.remove(); lines.forEach(line => line.classList.remove('dim')); };
  svg.addEventListener('pointerleave', leave);
  svg.addEventListener('pointermove', event => {
    const area = svg.getBoundingClientRect(), px = event.clientX - area.left, py = event.clientY - area.top;
    let nearest = { distance: 60 }; // pixels
    shown.forEach((series, k) => series.x.forEach((x, i) => {
      const distance = series.y[i] === null ? Infinity : Math.hypot(X(x) - px, Y(series.y[i]) - py);
      if (distance < nearest.distance) nearest = { distance, series, k, i };
    }));
    if (!nearest.series) return leave();
    const { series, k, i } = nearest, run = data.runs[series.run];
    lines.forEach((line, j) => line.classList.toggle('dim', j !== k));
    assign(mark, { cx: X(series.x[i]), cy: Y(series.y[i]), style: `stroke:${color(style, keyOf(style, series))}` });
    const label = ['run ' + run.name, run.label !== run.name && run.label, series.name].filter(Boolean).join(' · ');
    tip.textContent = `${label}: ${series.y[i]} at ${chart.x} ${series.x[i]}`;
    svg.append(mark);
    place.append(tip);
    tip.style.left = Math.max(0, Math.min(px + 12, W - tip.offsetWidth)) + 'px';
    tip.style.top = Math.max(0, py - tip.offsetHeight - 12) + 'px';
  });
  place.append(svg);
}
const drawAll = section => $$(`figure[data-of=${section}]`).forEach(draw);
for (const [section, charts] of Object.entries(data.charts)) {
  const series = charts.flatMap(chart => chart.series), few = new Set(series.map(s => s.run)).size <= 8;
  if (!series.length) continue;
  const distinct = data.choices.map((_, c) => new Set(series.map(s => data.runs[s.run].values[c])).size);
  styles[section] = { by: few ? -1 : distinct.findIndex(n => n > 1 && n <= 8), hidden: new Set() };
  legend(section);
  for (const box of $$(`figure[data-of=${section}] input`))
    box.addEventListener('change', () => { box.dataset.touched = ''; draw(box.closest('figure')); });
}
new ResizeObserver(() => Object.keys(styles).forEach(drawAll)).observe(document.querySelector('header'));

// enlarge a grid of samples, copy a command -------------------------------------------------------------------------------
const dialog = document.getElementById('large');
for (const button of $$('.enlarge')) button.addEventListener('click', () => {
  const { src, alt } = button.querySelector('img');
  Object.assign(dialog.querySelector('img'), { src, alt });
  dialog.showModal();
});
dialog.addEventListener('click', event => event.target === dialog && dialog.close());
for (const button of $$('.copy')) button.addEventListener('click', async () => {
  const code = button.previousElementSibling;
  getSelection().selectAllChildren(code); // if the clipboard is not available, the line is at least selected
  try { await navigator.clipboard.writeText(code.textContent); } catch { if (!document.execCommand('copy')) return; }
  button.textContent = 'Copied';
  setTimeout(() => { button.textContent = 'Copy'; }, 1500);
});
