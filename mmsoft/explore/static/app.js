"use strict";
// The view is the address; everything shown follows from it.
const BUDGETS = [4, 9, 16, 25, 49, 100, 196, 256, "all"];
const OKABE_ITO = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"];
const $ = (id) => document.getElementById(id);
let about, view, picture, bases, attention, overlay, asked = 0;

function bytes(packed) {
  const text = atob(packed.bytes), raw = new Uint8Array(text.length);
  for (let i = 0; i < raw.length; i++) raw[i] = text.charCodeAt(i);  // `from` takes twenty times as long
  const types = { float32: Float32Array, int32: Int32Array, uint8: Uint8Array };
  return new types[packed.dtype](raw.buffer);
}

function say(text) { $("status").textContent = text; }

async function ask(path, options) {
  const answer = await fetch(path, options);
  const content = await answer.json().catch(() => ({ error: `the server said ${answer.status}` }));
  if (!answer.ok) throw new Error(content.error);
  return content;
}

function query(extra) {
  const { image, stage, block, head, x, y, budget, solver } = view;
  return new URLSearchParams({ image, stage, block, head, x, y, budget, solver, ...extra }).toString();
}

function heads() {
  return about.blocks.find((b) => b.stage === view.stage && b.block === view.block).heads;
}

// Those of the slider, and one that came by a link.
function budgets() {
  const linked = Number(view.budget);
  if (!Number.isInteger(linked) || linked < 1 || BUDGETS.includes(linked)) return BUDGETS;
  return [...BUDGETS.slice(0, -1), linked].sort((a, b) => a - b).concat("all");
}

function nameBudget(budget) {
  const own = about.budget === null ? "all" : about.budget;
  $("budget-value").textContent = budget === "own" ? `${own} (the model's)` : budget;
}

function blocks() { return about.blocks.filter((b) => b.stage === view.stage); }

function readAddress() {
  const given = new URLSearchParams(location.search);
  const number = (name, otherwise) => {
    const value = given.get(name);
    return value !== null && value !== "" && isFinite(value) ? Number(value) : otherwise;
  };
  const stages = about.blocks.map((b) => b.stage);
  view = {
    image: given.get("image") || about.images[0] || "",
    stage: number("stage", stages.includes(1) ? 1 : stages[0]),
    block: number("block", -1),
    head: number("head", -1),
    x: number("x", -1),
    y: number("y", -1),
    budget: given.get("budget") || "own",
    solver: !about.by_content && given.get("solver") || about.solver,
    over: given.get("over") || "attention",
  };
  if (!stages.includes(view.stage)) view.stage = stages[0];
  if (!blocks().some((b) => b.block === view.block)) view.block = blocks().at(-1).block;
  if (view.head >= heads()) view.head = -1;
}

function writeAddress() {
  history.replaceState(null, "", `?${query({ over: view.over })}`);
}

function options(select, values, chosen) {
  select.replaceChildren(...values.map(([value, text]) => new Option(text, value, false, String(value) === String(chosen))));
}

function drawControls() {
  const stages = [...new Set(about.blocks.map((b) => b.stage))];
  options($("stage"), stages.map((s) => [s, s]), view.stage);
  options($("block"), blocks().map((b) => [b.block, b.block]), view.block);
  options($("head"), [[-1, "mean"], ...Array.from({ length: heads() }, (_, i) => [i, i])], view.head);
  options($("solver"), about.solvers.map((s) => [s, s === about.solver ? `${s} (the model's)` : s]), view.solver);
  $("solver").disabled = $("spectrum").hidden = about.by_content;
  $("no-inverse").hidden = !about.by_content;
  $("over").value = view.over;
  $("budget").max = budgets().length;
  $("budget").value = view.budget === "own" ? 0 : budgets().findIndex((b) => String(b) === view.budget) + 1;
  nameBudget(view.budget);
  for (const button of $("images").children) {
    button.setAttribute("aria-pressed", button.dataset.image === view.image);
  }
  const kinds = ["attention", "landmarks", "spectrum", "predictions"].filter((kind) => kind !== "spectrum" || !about.by_content);
  $("save").replaceChildren(...kinds.map((kind) => {
    const line = document.createElement("div");
    line.append(`${kind}: `);
    for (const type of ["png", "svg"]) {
      const link = document.createElement("a");
      link.href = `/figure/${kind}.${type}?${query()}`;
      link.textContent = type.toUpperCase();
      link.download = `${kind}.${type}`;
      line.append(link);
    }
    return line;
  }));
  const line = document.createElement("div");
  const link = Object.assign(document.createElement("a"), { href: `/numbers.csv?${query()}`, textContent: "CSV", download: "numbers.csv" });
  line.append("numbers: ", link);
  $("save").append(line);
}

function drawImages() {
  $("images").replaceChildren(...about.images.map((name) => {
    const button = document.createElement("button");
    button.dataset.image = name;
    const small = new Image();
    small.loading = "lazy";
    small.alt = "";
    small.src = `/api/thumbnail?image=${encodeURIComponent(name)}`;
    button.append(small, name.startsWith("upload-") ? "your image" : name);
    button.addEventListener("click", () => change({ image: name, x: -1, y: -1 }));
    return button;
  }));
}

// A field of numbers as an image: 0 and below dark, its largest value bright, as in the figures.
function painted(values, offset, [rows, columns]) {
  const canvas = new OffscreenCanvas(columns, rows);
  const context = canvas.getContext("2d");
  const image = context.createImageData(columns, rows);
  let low = Infinity, high = -Infinity;
  for (let i = 0; i < rows * columns; i++) {
    const v = values[offset + i];
    if (v < low) low = v;
    if (v > high) high = v;
  }
  for (let i = 0; i < rows * columns; i++) {
    const share = high > 0 ? Math.min(Math.max(values[offset + i] / high, 0), 1) : 0;
    const colour = about.viridis[Math.round(share * 255)], at = 4 * i;
    image.data[at] = colour[0];  // a list for every token takes three times as long
    image.data[at + 1] = colour[1];
    image.data[at + 2] = colour[2];
    image.data[at + 3] = 255;
  }
  context.putImageData(image, 0, 0);
  return { canvas, low, high };
}

function mean(values, count) {
  const n = values.length / count, out = new Float32Array(n);
  for (let h = 0; h < count; h++) for (let i = 0; i < n; i++) out[i] += values[h * n + i] / count;
  return out;
}

function place(context, canvas, extent, alpha) {
  const [left, right, bottom, top] = extent;
  context.globalAlpha = alpha;
  context.imageSmoothingEnabled = false;
  context.drawImage(canvas, left + 0.5, top + 0.5, right - left, bottom - top);
  context.globalAlpha = 1;
}

// `unit`: what is drawn as 1 / 500 of the longer side.
function ring(context, unit) {
  for (const [width, colour] of [[3.5, "black"], [1.5, "white"]]) {
    context.strokeStyle = colour;
    context.lineWidth = width * unit;
    context.beginPath();
    context.arc(view.x + 0.5, view.y + 0.5, 6 * unit, 0, 2 * Math.PI);
    context.stroke();
  }
}

// The picture in some size and colours, made once.
function base(greyed, side) {
  const key = `${greyed} ${side}`;
  if (bases[key]) return bases[key];
  const scale = side / Math.max(picture.width, picture.height);
  const size = [picture.width, picture.height].map((s) => Math.max(1, Math.round(s * scale)));
  const canvas = new OffscreenCanvas(...size), context = canvas.getContext("2d");
  if (greyed) context.filter = "grayscale(1)";
  context.drawImage(picture, 0, 0, ...size);
  return bases[key] = canvas;
}

// Coordinates are pixels of the file, whatever the size in which they are drawn.
function drawBase(canvas, greyed, side) {
  const drawn = base(greyed, side);
  canvas.width = drawn.width;
  canvas.height = drawn.height;
  const context = canvas.getContext("2d");
  context.drawImage(drawn, 0, 0);
  context.scale(canvas.width / picture.width, canvas.height / picture.height);
  return context;
}

function chosenField(kind) {
  const packed = kind === "softmax" ? attention.softmax : attention.rows;
  const count = packed.shape[0];
  packed.values ??= bytes(packed);
  if (view.head < 0) {
    packed.mean ??= mean(packed.values, count);
    return painted(packed.mean, 0, attention.grid);
  }
  return painted(packed.values, view.head * packed.values.length / count, attention.grid);
}

function number(value) {
  if (Number.isInteger(value)) return String(value);
  return Math.abs(value) >= 0.01 || value === 0 ? value.toPrecision(3) : value.toExponential(1);
}

function drawPicture() {
  if (!picture) return;
  const over = view.over;
  const field = over === "attention" || over === "softmax";
  const context = drawBase($("picture"), field || over === "landmarks", Math.max(1200, picture.width, picture.height));
  const scale = Math.max(picture.width, picture.height) / 500;
  let legend = [], highest;
  if (field && attention) {
    const { canvas, low, high } = chosenField(over);
    place(context, canvas, attention.extent, 0.65);
    const who = view.head < 0 ? "mean over heads" : `head ${view.head}`;
    legend = [`${over === "softmax" ? "softmax" : about.variant}, ${who}: what the ringed pixel, x ${view.x}, y ${view.y}, attends to; click another. Lowest ${number(low)}`];
    highest = number(high);
  } else if (over === "landmarks" && overlay?.kind === "landmarks") {
    drawRegions(context, overlay.content, scale);
    const regions = new Set(bytes(overlay.content.regions)), count = overlay.content.centres.shape[0];
    const what = about.by_content ? "the landmark whose kernel with a token is largest, as they were chosen by; tokens read by other weights" : "regions of its landmarks";
    legend = [`head ${overlay.content.head}: ${what}, ${regions.size} of ${count} in use (dots: where they were sampled)`];
  } else if (over === "predictions" && overlay?.kind === "predictions") {
    legend = drawPredictions(context, overlay.content, scale);
  }
  if (view.x >= 0) ring(context, scale);
  $("legend").replaceChildren(...legend);
  $("scale").hidden = highest === undefined;
  $("highest").textContent = highest ?? "";
}

function drawRegions(context, found, scale) {
  const [rows, columns] = found.grid;
  const regions = bytes(found.regions), canvas = new OffscreenCanvas(columns, rows);
  const paint = canvas.getContext("2d"), image = paint.createImageData(columns, rows);
  const used = [...new Set(regions)];  // the few in use are to have unlike colours
  regions.forEach((region, i) => {
    const colour = about.viridis[Math.floor(((used.indexOf(region) * 0.6180339887) % 1) * 256)];
    image.data.set([...colour, 255], 4 * i);
  });
  paint.putImageData(image, 0, 0);
  place(context, canvas, found.extent, 0.6);
  const [left, right, bottom, top] = found.extent, centres = bytes(found.centres);
  context.fillStyle = "white";
  context.strokeStyle = "black";
  context.lineWidth = scale / 2;
  for (let i = 0; i < centres.length; i += 2) {
    context.beginPath();
    const x = left + (centres[i + 1] + 0.5) / columns * (right - left), y = top + (centres[i] + 0.5) / rows * (bottom - top);
    context.arc(x + 0.5, y + 0.5, 2 * scale, 0, 2 * Math.PI);  // as `place`: a pixel's middle is at 0.5
    context.fill();
    context.stroke();
  }
}

// Returns what is said under the picture.
function drawPredictions(context, found, scale) {
  const name = (label) => found.names?.[label] ?? String(label);
  if (found.kind === "classes") {
    const [rows, columns] = found.map.shape, classes = bytes(found.map);
    const canvas = new OffscreenCanvas(columns, rows), paint = canvas.getContext("2d");
    const image = paint.createImageData(columns, rows), seen = new Set();
    classes.forEach((label, i) => {
      seen.add(label);
      const hex = OKABE_ITO[label % OKABE_ITO.length];
      image.data.set([1, 3, 5].map((j) => parseInt(hex.slice(j, j + 2), 16)), 4 * i);
      image.data[4 * i + 3] = 255;
    });
    paint.putImageData(image, 0, 0);
    place(context, canvas, [-0.5, columns - 0.5, rows - 0.5, -0.5], 0.55);
    return [...seen].sort((a, b) => a - b).map((label) => {
      const entry = Object.assign(document.createElement("span"), { className: "class", textContent: name(label) });
      entry.style.setProperty("--colour", OKABE_ITO[label % OKABE_ITO.length]);
      return entry;
    });
  }
  const labels = bytes(found.labels), scores = bytes(found.scores);
  const texts = [...labels].map((label, i) => `${name(label)} ${scores[i].toFixed(2)}`);
  if (found.kind === "scores") return [texts.join(", ")];
  const boxes = bytes(found.boxes);
  context.lineWidth = 2 * scale;
  context.font = `${11 * scale}px sans-serif`;
  texts.forEach((text, i) => {
    const [left, top, right, bottom] = boxes.slice(4 * i, 4 * i + 4);
    context.strokeStyle = context.fillStyle = OKABE_ITO[labels[i] % OKABE_ITO.length];
    context.strokeRect(left, top, right - left, bottom - top);
    context.fillRect(left, top - 13 * scale, context.measureText(text).width + 6 * scale, 13 * scale);
    context.fillStyle = "white";
    context.fillText(text, left + 3 * scale, top - 3 * scale);
  });
  return [`${texts.length} objects with a score of at least ${found.threshold}`];
}

function drawMaps() {
  const items = [];
  for (const [kind, packed] of [["attention", attention.rows], ["softmax", attention.softmax]]) {
    const count = packed.shape[0];
    packed.values ??= bytes(packed);
    for (let head = 0; head < count; head++) {
      const { canvas, low, high } = painted(packed.values, head * packed.values.length / count, attention.grid);
      const button = document.createElement("button");
      button.className = "map";
      Object.assign(button.dataset, { kind, head, low, high });
      button.setAttribute("aria-pressed", view.head === head && view.over === kind);
      const small = document.createElement("canvas");
      const context = drawBase(small, true, 320);
      place(context, canvas, attention.extent, 0.75);
      ring(context, Math.max(picture.width, picture.height) / 150);
      button.append(small, `${kind === "softmax" ? "softmax" : about.variant}, head ${head}`, document.createElement("br"), `${number(low)} to ${number(high)}`);
      button.addEventListener("click", () => change({ head, over: kind }));
      items.push(button);
    }
  }
  $("maps").replaceChildren(...items);
}

function ranked() { return about.by_content ? "the weights with which tokens read landmarks" : "the kernel of tokens and landmarks"; }

function drawNumbers(usage) {
  const columns = ["landmarks", "rank", "nearest", "ratio", "varying"];
  const line = (cells, tag) => {
    const row = document.createElement("tr");
    row.append(...cells.map((text) => Object.assign(document.createElement(tag), { textContent: text })));
    return row;
  };
  const rows = usage.rank.map((_, head) => {
    const row = line([head, ...columns.map((c) => number(usage[c][head]))], "td");
    row.className = head === view.head ? "chosen" : "";
    Object.assign(row.dataset, { rank: usage.rank[head] });
    return row;
  });
  const head = line(["head", "landmarks", "rank", "nearest", "ratio", "varying"], "th");
  const titles = ["", "how many there are", `effective rank of ${ranked()}: 1, and all rows are alike`, "largest kernel value of a token, median", "size beside the values' convolution", "share that differs between tokens"];
  [...head.children].forEach((cell, i) => { cell.title = titles[i]; });
  $("numbers").replaceChildren(head, ...rows);
}

function drawChanged() {
  const changed = attention.changed;
  const landmarks = Math.max(...attention.landmarks);
  const percent = (share) => `${(100 * share).toPrecision(2)} %`;
  $("changed").textContent = changed
    ? `${landmarks} landmarks. Beside the model's own settings, this row differs by ${percent(changed.row)}, the last features by ${percent(changed.features)}.`
    : `${landmarks} landmarks: the model's own settings.`;
}

async function load(name, version) {
  const image = new Image();
  image.src = `/api/image?${new URLSearchParams({ image: name, version })}`;
  await image.decode().catch(async () => {
    const why = await ask(image.src).then(() => "", (error) => `: ${error.message}`);
    throw new Error(`${name} cannot be shown${why}`);
  });
  return image;
}

let shown = "", version, layer = "";
async function refresh() {
  const mine = ++asked;
  const late = () => mine !== asked;
  drawControls();
  if (!view.image) { say("Drop an image to begin."); return; }
  say("computing");
  const start = performance.now();
  try {
    if (shown !== view.image) {
      const image = await load(view.image, performance.now());
      if (late()) return;
      picture = image;
      bases = {};
      shown = view.image;
      attention = overlay = version = undefined;
    }
    if (view.x < 0 || view.y < 0) {
      view.x = Math.floor(picture.width / 2);
      view.y = Math.floor(picture.height / 2);
      drawControls();
    }
    writeAddress();
    const found = await ask(`/api/attention?${query()}`);
    if (late()) return;
    if (version !== undefined && version !== found.version) {  // another file has taken the name
      const image = await load(view.image, found.version);
      if (late()) return;
      picture = image;
      bases = {};
      overlay = undefined;
    }
    version = found.version;
    attention = found;
    drawPicture();
    drawMaps();
    drawChanged();
    document.body.dataset.ready = location.search;
    document.body.dataset.milliseconds = performance.now() - start;
    say(`answered in ${Math.round(performance.now() - start)} ms`);
    if (view.over === "landmarks" || view.over === "predictions") {
      const content = await ask(`/api/${view.over}?${query()}`);
      if (late()) return;
      overlay = { kind: view.over, content };
      drawPicture();
    }
    const { x, y, head, over, ...rest } = { ...view, version };
    if (layer !== JSON.stringify(rest)) {
      const usage = await ask(`/api/usage?${query()}`);
      if (late()) return;
      layer = JSON.stringify(rest);
      drawNumbers.last = usage;
      if (!about.by_content) $("spectrum").src = `/figure/spectrum.svg?${query()}`;
    }
    drawNumbers(drawNumbers.last);
    document.body.dataset.complete = location.search;
  } catch (error) {
    if (late()) return;
    shown = "";  // the file may be another one by now
    say(error.message);
  }
}

function change(part) {
  Object.assign(view, part);
  if (!blocks().some((b) => b.block === view.block)) view.block = blocks().at(-1).block;
  if (view.head >= heads()) view.head = -1;
  refresh();
}

function step(list, value) { return list[(list.findIndex((v) => String(v) === String(value)) + 1) % list.length]; }

function budgetAt(at) { return at === 0 ? "own" : String(budgets()[at - 1]); }

function setBudget(at) { change({ budget: budgetAt(at) }); }

function pick(event) {
  const box = $("picture").getBoundingClientRect();
  const x = Math.floor((event.clientX - box.left) / box.width * picture.width);
  const y = Math.floor((event.clientY - box.top) / box.height * picture.height);
  change({ x: Math.min(Math.max(x, 0), picture.width - 1), y: Math.min(Math.max(y, 0), picture.height - 1) });
}

function key(event) {
  if (event.ctrlKey || event.metaKey || event.altKey || !picture) return;
  // Arrows are the control's that has the focus; the letters are ours.
  if (event.key.startsWith("Arrow") && ["SELECT", "INPUT"].includes(event.target.tagName)) return;
  const far = event.shiftKey ? 10 : 1;
  const move = (dx, dy) => change({
    x: Math.min(Math.max(view.x + dx * far, 0), picture.width - 1),
    y: Math.min(Math.max(view.y + dy * far, 0), picture.height - 1),
  });
  const at = Number($("budget").value);
  const keys = {
    ArrowLeft: () => move(-1, 0),
    ArrowRight: () => move(1, 0),
    ArrowUp: () => move(0, -1),
    ArrowDown: () => move(0, 1),
    h: () => change({ head: view.head + 1 < heads() ? view.head + 1 : -1 }),
    b: () => change({ block: step(blocks().map((b) => b.block), view.block) }),
    s: () => change({ stage: step([...new Set(about.blocks.map((b) => b.stage))], view.stage) }),
    o: () => change({ over: step([...$("over").options].map((o) => o.value), view.over) }),
    v: () => about.by_content || change({ solver: step(about.solvers, view.solver) }),
    "+": () => setBudget(Math.min(at + 1, budgets().length)),
    "-": () => setBudget(Math.max(at - 1, 0)),
  };
  if (keys[event.key]) {
    event.preventDefault();
    keys[event.key]();
  }
}

async function send(file) {
  if (!file) return;
  if (file.size > about.upload_bytes) {
    say(`a picture may have ${about.upload_bytes / 1e6} MB`);
    return;
  }
  say("sending the image");
  try {
    const { image } = await ask("/api/upload", { method: "POST", body: file });
    about.images.unshift(image);
    drawImages();
    change({ image, x: -1, y: -1 });
  } catch (error) {
    say(error.message);
  }
}

async function begin() {
  about = await ask("/api/about");
  $("ranked").textContent = ranked();
  $("model").textContent = `${about.model} with ${about.backbone}`;
  readAddress();
  if (view.image.startsWith("upload-")) about.images.unshift(view.image);
  drawImages();
  const stops = about.viridis.filter((_, i) => i % 15 === 0).map((colour) => `rgb(${colour})`);
  $("bar").style.background = `linear-gradient(to right, ${stops})`;
  $("picture").addEventListener("click", pick);
  document.addEventListener("keydown", key);
  for (const name of ["stage", "block", "head"]) $(name).addEventListener("change", (e) => change({ [name]: Number(e.target.value) }));
  for (const name of ["over", "solver"]) $(name).addEventListener("change", (e) => change({ [name]: e.target.value }));
  $("budget").addEventListener("input", (e) => nameBudget(budgetAt(Number(e.target.value))));  // while it is dragged
  $("budget").addEventListener("change", (e) => setBudget(Number(e.target.value)));
  $("file").addEventListener("change", (e) => send(e.target.files[0]));
  for (const kind of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      $("drop").classList.toggle("over", kind === "dragover");
      if (kind === "drop") send(event.dataTransfer.files[0]);
    });
  }
  window.addEventListener("popstate", () => { readAddress(); refresh(); });
  refresh();
}

begin().catch((error) => say(error.message));
