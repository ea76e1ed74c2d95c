"use strict";
// All numbers are in the page's data, computed by records/page.py. Here they are chosen, placed and drawn.

const at = id => document.getElementById(id);
const data = JSON.parse(at("data").textContent);
const hidden = new Set();  // variants that the legend has switched off

const percent = share => `${(100 * share).toFixed(1).replace(/\.0$/, "").replace("-", "−")} %`;
const short = value => value === null ? "not finite" : String(+value.toPrecision(4)).replace("-", "−");
const known = value => value !== null && value !== undefined;

// What the controls say.
const limit = () => +at("tolerance").value;  // a place in data.tolerances
const variantNow = () => data.variants[+at("variant").value];
const lossOf = (point, k) => point.losses ? point.losses[k] : -Infinity;
const pointNow = () => variantNow().points[+at("rate").value];

// ---- elements

const SVG = ["svg", "g", "path", "line", "rect", "clipPath", "circle", "text"];

function make(tag, attributes, ...children) {
  const made = SVG.includes(tag) ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);  // a string stays text, whatever a caption holds
  return made;
}

function picture(place, alt) {
  return known(place) ? make("img", {src: `data:image/webp;base64,${data.files[place]}`, alt, draggable: "false"})
    : make("span", {}, "no image");
}

// Show a title, lines of text and small pictures beside a box on the screen.
function showTip(box, title, lines, places = []) {
  const tip = at("tip");
  tip.replaceChildren(make("strong", {}, title), ...lines.map(line => make("span", {}, line)),
    make("div", {}, ...places.filter(known).map(place => picture(place, ""))));
  tip.hidden = false;
  const fits = box.right + 12 + tip.offsetWidth < innerWidth;
  tip.style.left = `${scrollX + Math.max(4, fits ? box.right + 12 : box.left - 12 - tip.offsetWidth)}px`;
  tip.style.top = `${scrollY + Math.max(4, Math.min(innerHeight - tip.offsetHeight - 4, box.top - 20))}px`;
}

function hideTip() {
  at("tip").hidden = true;
}

// ---- axes

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map(n => n * power).find(n => n >= rough);
  const found = [];
  for (let n = Math.ceil(low / step); n * step <= high; n++) found.push(n * step);
  return found;
}

// The ends of an axis that holds the values, with some room.
function span(values) {
  const low = Math.min(...values), high = Math.max(...values), room = 0.05 * (high - low || 1);
  return {low: low - room, high: high + room};
}

// Clear an svg and draw axes {low, high, ticks, label, title}. Returns the inner box, and functions from values to it.
function axes(svg, x, y) {
  const {width, height} = svg.viewBox.baseVal;
  const box = {left: 75, right: width - 25, top: 40, bottom: height - 60};
  const px = value => box.left + (value - x.low) / (x.high - x.low) * (box.right - box.left);
  const py = value => box.bottom - (value - y.low) / (y.high - y.low) * (box.bottom - box.top);
  svg.replaceChildren(
    make("text", {x: (box.left + box.right) / 2, y: height - 12, "text-anchor": "middle"}, x.title),
    make("text", {x: 12, y: 24}, y.title));
  for (const tick of x.ticks) {
    svg.append(make("text", {x: px(tick), y: box.bottom + 24, "text-anchor": "middle"}, x.label(tick)));
    if (x.grid) svg.append(make("line", {class: "rule", x1: px(tick), x2: px(tick), y1: box.top, y2: box.bottom}));
  }
  for (const tick of y.ticks) {
    level(svg, box, py(tick), "rule");
    svg.append(make("text", {x: box.left - 10, y: py(tick) + 5, "text-anchor": "end"}, y.label(tick)));
  }
  return {px, py, box};
}

function level(svg, box, y, name, words = "") {
  svg.append(make("line", {class: name, x1: box.left, x2: box.right, y1: y, y2: y}),
    make("text", {x: box.right, y: y - 6, "text-anchor": "end"}, words));
}

// ---- the accepted loss and the table of safe rates

function showSafe() {
  const chosen = limit(), accepted = percent(data.tolerances[chosen]);
  at("tolerance-value").textContent = accepted;
  at("tolerance").setAttribute("aria-valuetext", accepted);
  at("lead").textContent = data.leads[chosen];
  at("words").replaceChildren(...data.variants.map(variant => make("li", {}, variant.answers[chosen].words)));
  const safe = data.variants.map(variant => variant.points[variant.answers[chosen].safe]);
  data.variants.forEach((variant, i) => {
    const point = safe[i], answer = variant.answers[chosen];
    const texts = {rate: answer.rate, next: answer.next, ...point && point.cells,
      failing: point && point.failing && failing(variant, point)};
    for (const cell of document.querySelectorAll(`[data-variant="${i}"] [data-cell]`)) {
      const name = cell.dataset.cell, saved = safe.map(each => each ? each.savings[name] : 0);
      cell.textContent = texts[name] || "–";
      cell.classList.toggle("none", !point);
      cell.classList.toggle("best", safe.length > 1 && saved[i] > 0.005 && saved[i] === Math.max(...saved));
    }
  });
}

function failing(variant, point) {
  const count = point.failing[limit()];
  return `${count} of ${variant.images}${count ? `\nworst ${point.worst}` : ""}`;
}

// ---- the frontier

const MARKS = {  // outlines of matplotlib's markers, in a box from -1 to 1
  "o": "M-1,0a1,1 0 1,0 2,0a1,1 0 1,0 -2,0z",
  "s": "M-.9,-.9H.9V.9H-.9z",
  "D": "M0,-1.2L1.2,0L0,1.2L-1.2,0z",
  "^": "M0,-1.1L1.1,.9H-1.1z",
  "v": "M0,1.1L1.1,-.9H-1.1z",
  "<": "M-1.1,0L.9,-1.1V1.1z",
  ">": "M1.1,0L-.9,-1.1V1.1z",
  "P": "M-.4,-1.1H.4V-.4H1.1V.4H.4V1.1H-.4V.4H-1.1V-.4H-.4z",
  "X": "M-1.1,-.6L-.6,-1.1L0,-.5L.6,-1.1L1.1,-.6L.5,0L1.1,.6L.6,1.1L0,.5L-.6,1.1L-1.1,.6L-.5,0z",
  "*": "M0,-1.3L.35,-.4H1.3L.55,.2L.8,1.1L0,.6L-.8,1.1L-.55,.2L-1.3,-.4H-.35z",
  "p": "M0,-1.1L1.1,-.3L.7,1H-.7L-1.1,-.3z",
  "h": "M0,-1.15L1,-.6V.6L0,1.15L-1,.6V-.6z",
};

function mark(variant, x, y, size, attributes) {
  return make("path", {d: MARKS[variant.marker], transform: `translate(${x} ${y}) scale(${size})`,
    "vector-effect": "non-scaling-stroke", ...attributes});
}

function drawLegend() {
  at("legend").hidden = data.variants.length === 1;
  at("legend").replaceChildren(...data.variants.map(variant => {
    const key = make("svg", {viewBox: "0 0 30 14", "aria-hidden": "true"},
      make("path", {class: "curve", d: "M0,7H30", "stroke-dasharray": variant.dashed ? "6 4" : "none"}),
      mark(variant, 15, 7, 5, {class: "mark"}));
    const parts = variant.name.split(/(?=\+)/).flatMap(part => [make("wbr", {}), part]);
    const button = make("button", {type: "button", class: "colour", style: `--own: ${variant.colour}`,
      "aria-pressed": "true"}, key, make("span", {}, ...parts));
    button.onclick = () => {
      if (!hidden.delete(variant)) hidden.add(variant);
      button.setAttribute("aria-pressed", !hidden.has(variant));
      drawFrontier();
    };
    return button;
  }));
}

function drawFrontier() {
  const svg = at("frontier"), x = at("x").value, y = at("y").value, metric = data.metrics[y];
  svg.closest("section").hidden = !metric;
  if (!metric) return;
  const across = point => x === "rate" ? point.rate : point.savings[x];
  const height = point => point.metrics[y][0];
  const shown = data.variants.filter(variant => !hidden.has(variant));
  const dense = data.variants[0].points[0].metrics[y][0], decides = y === data.quality && dense > 0;
  const near = decides && at("near").checked;
  at("near-label").hidden = !decides;

  const placed = point => known(height(point)) && known(across(point));
  const points = shown.flatMap(variant => variant.points).filter(placed);
  const ends = [0, ...points.flatMap(point => point.metrics[y]), ...Object.values(metric.levels).flat()].filter(known);
  const up = near ? {low: 0.6 * dense, high: Math.max(1.03 * dense, ...ends)} : span(ends);
  const seen = points.filter(point => height(point) >= up.low);
  const along = span([0, 0.1, ...seen.map(across)]);
  const title = x === "rate" ? "rate asked for" : data.savings[x];
  const {px, py, box} = axes(svg,
    {...along, ticks: ticks(along.low, along.high, 8), label: x === "rate" ? short : percent, title, grid: true},
    {...up, ticks: ticks(up.low, up.high, 6), label: short,
      title: `${metric.title} ${metric.better} is better${metric.unit && `, ${metric.unit}`}`});
  svg.setAttribute("aria-label", `${y} over ${title}. Arrow keys go from point to point.`);
  svg.append(make("clipPath", {id: "inside"}, make("rect", {x: box.left - 9, y: box.top - 9,
    width: box.right - box.left + 18, height: box.bottom - box.top + 9})));

  if (known(dense)) level(svg, box, py(dense), "dense", "dense");
  if (decides) level(svg, box, py(dense * (1 - data.tolerances[limit()])), "limit");
  for (const [words, values] of Object.entries(metric.levels)) {
    values.forEach((value, i) => level(svg, box, py(value), "dense", i ? "" : words));
  }
  for (const variant of shown) {
    const own = variant.points.filter(placed);
    const line = own.map(point => [px(across(point)), py(height(point))]);
    const group = make("g", {class: "colour", style: `--own: ${variant.colour}`, "clip-path": "url(#inside)"},
      make("path", {class: "curve", d: line.map((place, i) => `${i ? "L" : "M"}${place}`).join(""),
        "stroke-dasharray": variant.dashed ? "9 6" : "none"}));
    own.forEach((point, i) => {
      const [, low, high] = point.metrics[y], [left, top] = line[i], reach = point.reach[x];
      if (known(low) && high > low) {
        group.append(make("line", {class: "whisker", x1: left, x2: left, y1: py(low), y2: py(high)}));
      }
      if (reach) group.append(make("line", {class: "whisker", x1: px(reach[0]), x2: px(reach[1]), y1: top, y2: top}));
      if (seen.includes(point)) group.append(reachable(variant, point, left, top, y));
    });
    svg.append(group);
  }
  const first = svg.querySelector(".mark");
  if (first) first.setAttribute("tabindex", "0");
}

// A mark that says its values when the mouse or the keyboard reaches it, and is shown up close when chosen.
function reachable(variant, point, left, top, y) {
  const [value, low, high] = point.metrics[y];
  const name = `${variant.name}, ${point.rate ? `rate ${point.label}` : "dense"}`;
  const made = mark(variant, left, top, 6.5, {class: "mark", tabindex: "-1", role: "img", "aria-label": name});
  const lines = [`${y} ${short(value)}${high > low ? ` (${short(low)} to ${short(high)})` : ""}`,
    ...Object.entries(data.cells).map(([cell, title]) => `${title}: ${point.cells[cell].replace("\n", " ")}`)];
  const places = Object.values(variant.places).slice(0, 4).map(row => row[variant.points.indexOf(point)]);
  made.onmouseenter = made.onfocus = () => showTip(made.getBoundingClientRect(), name, lines, places);
  made.onmouseleave = made.onblur = hideTip;
  made.onclick = () => {
    at("variant").value = data.variants.indexOf(variant);
    showVariant(variant.points.indexOf(point));
    at("close").scrollIntoView();
  };
  return made;
}

function walkFrontier(event) {
  const along = {ArrowRight: 1, ArrowLeft: -1}[event.key] || 0, among = {ArrowUp: 1, ArrowDown: -1}[event.key] || 0;
  if (event.key === "Enter") event.target.onclick();
  if (!along && !among) return;
  event.preventDefault();
  const groups = [...at("frontier").querySelectorAll("g")].map(group => [...group.querySelectorAll(".mark")])
    .filter(marks => marks.length);
  const row = groups.findIndex(marks => marks.includes(event.target));
  const marks = groups[(row + among + groups.length) % groups.length];
  const place = groups[row].indexOf(event.target) + along;
  marks[Math.max(0, Math.min(marks.length - 1, place))].focus();
}

// ---- one variant: its images, their losses, its layers

function showVariant(place) {
  const variant = variantNow();
  at("variant-name").textContent = variant.name;
  at("rate").max = variant.points.length - 1;
  at("rate").value = place;
  at("no-layers").hidden = variant.maps.length > 0;
  at("layers").replaceChildren(...variant.maps.map(drawMap), ...variant.maps.slice(0, 1).flatMap(drawShares));
  showRate();
}

function showRate() {
  at("rate-value").textContent = pointNow().label;
  at("rate").setAttribute("aria-valuetext", pointNow().label);
  drawGrid();
  drawLosses();
}

function drawGrid() {
  const variant = variantNow(), point = pointNow(), accepted = data.tolerances[limit()];
  const words = at("filter").value.toLowerCase().split(/\s+/);
  const all = Object.keys(variant.places);
  const found = all.filter(k => words.every(word => variant.captions[k].toLowerCase().includes(word)));
  if (at("order").value === "loss") found.sort((a, b) => lossOf(point, b) - lossOf(point, a));
  at("pictures").hidden = !all.length;
  at("no-pictures").hidden = all.length > 0;
  at("count").textContent = `${found.length} of ${variant.images} images`;
  at("grid").replaceChildren(...found.map(k => {
    const caption = variant.captions[k], row = variant.places[k], loss = lossOf(point, k);
    const pair = make("div", {class: "pair"}, picture(row[0], `dense: ${caption}`),
      picture(row[variant.points.indexOf(point)], `${point.label}: ${caption}`));
    pair.onpointermove = event => {
      const box = pair.getBoundingClientRect();
      pair.style.setProperty("--swipe", `${100 * (event.clientX - box.left) / box.width}%`);
    };
    pair.onpointerleave = () => pair.style.removeProperty("--swipe");
    const changed = loss > -Infinity && point.rate > 0;
    const lost = changed ? `${loss > 0 ? "loses" : "gains"} ${percent(Math.abs(loss))}` : "";
    return make("figure", {}, pair,
      make("figcaption", {}, make("b", {class: changed && loss > accepted ? "over" : ""}, lost), caption));
  }));
}

function drawLosses() {
  const svg = at("losses"), variant = variantNow(), points = variant.points.slice(1), chosen = pointNow();
  const measured = points.filter(point => point.losses), accepted = data.tolerances[limit()];
  const words = !measured.length ? `${data.quality} of single images was not measured.`
    : !chosen.rate ? "Choose a rate to see how many images lose more than you accept."
      : `At rate ${chosen.label}, ${chosen.failing[limit()]} of ${variant.images} images lose more than `
        + `${percent(accepted)}.`;
  at("losses-words").textContent = words;
  svg.setAttribute("aria-label", words);
  svg.toggleAttribute("hidden", !measured.length);
  if (!measured.length) return;
  const up = span([-0.05, 0.1, ...measured.flatMap(point => [...Object.values(point.losses), ...point.quantiles])]);
  const {px, py, box} = axes(svg,
    {low: -0.5, high: points.length - 0.5, ticks: points.map((_, i) => i), label: i => points[i].label, title: "rate"},
    {...up, ticks: ticks(up.low, up.high, 6), label: percent, title: `loss of ${data.quality} ↓ lower is better`});
  const width = Math.min(90, px(1) - px(0));
  measured.forEach(point => {
    const i = points.indexOf(point), x = px(i);
    if (point === chosen) {
      svg.append(make("rect", {class: "chosen", x: x - width / 2, y: box.top, width, height: box.bottom - box.top}));
    }
    for (const [k, loss] of Object.entries(point.losses)) {
      const aside = (k * 0.618034 % 1 - 0.5) * 0.5 * width;  // spreads neighbours evenly
      const dot = make("circle", {class: "dot", cx: x + aside, cy: py(loss), r: 3.5});
      const row = variant.places[k] || [];
      dot.onmouseenter = () => showTip(dot.getBoundingClientRect(), `${percent(loss)} at rate ${point.label}`,
        [variant.captions[k]], [row[0], row[i + 1]]);
      dot.onmouseleave = hideTip;
      svg.append(dot);
    }
    const [low, quarter, middle, other, high] = point.quantiles.map(py);
    const left = x - 0.3 * width, right = x + 0.3 * width;
    svg.append(make("path", {class: "box", d: `M${x},${low}V${quarter}M${x},${other}V${high}`
      + `M${left},${quarter}H${right}V${other}H${left}zM${left},${middle}H${right}`}));
  });
  level(svg, box, py(0), "dense");
  level(svg, box, py(accepted), "limit");
}

// A map of rates, from below, by layers: a pixel a cell, which the page stretches.
function drawMap(map) {
  const rows = map.rates.length, columns = map.names.length;
  const canvas = make("canvas", {width: columns, height: rows, tabindex: "0", role: "img",
    style: `height: ${rows * Math.max(14, Math.min(24, 160 / rows))}px`,
    "aria-label": `${map.title}, by rate and layer. Arrow keys go from cell to cell.`});
  const pen = canvas.getContext("2d");
  map.shades.forEach((row, i) => row.forEach((shade, j) => {
    if (!known(shade)) return;
    pen.fillStyle = data.palette[shade];
    pen.fillRect(j, rows - 1 - i, 1, 1);
  }));

  let [i, j] = [0, 0];  // the cell that is told
  const tell = (row, column) => {
    [i, j] = [Math.max(0, Math.min(rows - 1, row)), Math.max(0, Math.min(columns - 1, column))];
    const box = canvas.getBoundingClientRect(), wide = box.width / columns, value = map.values[i][j];
    const cell = {left: box.left + j * wide, right: box.left + (j + 1) * wide,
      top: box.top + (rows - 1 - i) / rows * box.height};
    showTip(cell, map.names[j], [`rate ${map.rates[i]}: ${map.title} ${known(value) ? short(value) : "not known"}`,
        ...Object.entries(map.shares).map(([what, each]) => `${percent(each[j])} of the ${what}`)]);
  };
  canvas.onpointermove = event => {
    const box = canvas.getBoundingClientRect();
    tell(rows - 1 - Math.floor((event.clientY - box.top) / box.height * rows),
      Math.floor((event.clientX - box.left) / box.width * columns));
  };
  canvas.onfocus = () => tell(i, j);
  canvas.onpointerleave = canvas.onblur = hideTip;
  canvas.onkeydown = event => {
    const step = {ArrowUp: [1, 0], ArrowDown: [-1, 0], ArrowRight: [0, 1], ArrowLeft: [0, -1]}[event.key];
    if (!step) return;
    event.preventDefault();
    tell(i + step[0], j + step[1]);
  };
  const scale = make("span", {class: "scale", style: `background: linear-gradient(to right, ${data.palette})`});
  return make("div", {class: "map"},
    make("p", {}, make("span", {}, `${map.title}, rates ${map.rates[0]} (below) to ${map.rates[rows - 1]}`),
      make("span", {}, map.scale[0], scale, map.scale[1])),
    canvas, make("p", {}, make("span", {}, map.names[0]), make("span", {}, map.names[columns - 1])));
}

// Bars of each layer's shares of the denoiser, below its maps and as wide.
function drawShares(map) {
  return Object.entries(map.shares).map(([what, each]) => {
    const most = Math.max(...each), height = 40;
    const canvas = make("canvas", {class: "bars", width: each.length, height, "aria-hidden": "true"});
    const pen = canvas.getContext("2d");
    pen.fillStyle = "#6d8fb8";
    each.forEach((share, j) => pen.fillRect(j, height, 1, -height * share / most));
    const words = `share of the ${what}, at most ${percent(most)} in a layer`;
    return make("div", {class: "map"}, canvas, make("p", {}, words));
  });
}

// ---- downloads

function download(name, type, text) {
  const link = make("a", {download: name, href: URL.createObjectURL(new Blob([text], {type}))});
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

// ---- controls

at("tolerance").oninput = () => { showSafe(); drawFrontier(); showRate(); };
at("x").onchange = at("y").onchange = at("near").onchange = drawFrontier;
at("frontier").onkeydown = walkFrontier;
at("variant").onchange = () => showVariant(Math.min(+at("rate").value, variantNow().points.length - 1));
at("rate").oninput = showRate;
at("order").onchange = at("filter").oninput = drawGrid;
at("swipe").oninput = () => at("grid").style.setProperty("--swipe", `${at("swipe").value}%`);
at("csv").onclick = () => download("results.csv", "text/csv", data.csv);
at("json").onclick = () => download("report.json", "application/json",
  JSON.stringify({...data, files: undefined, palette: undefined, csv: undefined}, null, 1));
addEventListener("keydown", event => { if (event.key === "Escape") hideTip(); });
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach(each => { each.open = true; }));

at("x").value = data.first.saving;
at("variant").value = data.first.variant;
showSafe();
drawLegend();
drawFrontier();
showVariant(variantNow().answers[limit()].safe ?? variantNow().points.length - 1);
