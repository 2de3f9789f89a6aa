"use strict";
// The model as a graph of units, coloured by scheme: laid out when its section is opened, regions closed at first.
// Foreign names reach the page only through textContent, attributes and value comparisons, never as markup.
(() => {
  const byId = (id) => document.getElementById(id);
  const frame = byId("graph-frame");
  const card = byId("graph-card");
  const START = 30; // boxes that are shown at first, at most
  const MANY = 60; // units directly in one region, beyond which they are shown in runs
  const RUN = 25;
  const MOST = 250; // boxes beyond which a layout takes seconds: everything is opened up to there
  const WIDTH = 176;
  const LETTERS = 25;
  const COLOURS = 8;
  const HEAD = 12; // what the head of an open region takes above what is in it

  const make = (tag, attributes = {}, text) => {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const draw = (tag, attributes = {}, text) => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.textContent = text;
    return node;
  };
  const microseconds = (us) => (us === null || us === undefined ? "time unknown"
    : us.toLocaleString("en", { minimumFractionDigits: us < 100 ? 1 : 0, maximumFractionDigits: us < 100 ? 1 : 0 }) + " µs");
  const counted = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
  const short = (text) => (text.length > LETTERS ? "…" + text.slice(1 - LETTERS) : text);

  let data, units, root, scale = 1, size = { width: 1, height: 1 }, chosen = null;
  const open = new Set();

  // --- the tree of regions --------------------------------------------------------------------------------------
  const colourOf = (unit) => data.planned.indexOf(unit.scheme) % COLOURS;
  const timeOf = (unit) => unit.times[data.schemes.indexOf(unit.scheme)];
  const pathOf = (unit) => (unit.region === data.root ? [] : unit.region.split("/"));
  const group = (path, parent) => ({ path, parent, groups: new Map(), units: [], all: [], run: null });

  function tree() {
    const top = group([], null);
    units.forEach((unit, index) => {
      let at = top;
      at.all.push(index);
      for (const name of pathOf(unit)) {
        if (!at.groups.has(name)) at.groups.set(name, group([...at.path, name], at));
        at = at.groups.get(name);
        at.all.push(index);
      }
      at.units.push(index);
    });
    return top;
  }

  // What is directly in a region: closed chains of single regions are one, a region of one unit is that unit.
  function items(parent) {
    if (parent.items) return parent.items;
    const found = [];
    for (let child of parent.groups.values()) {
      while (child.units.length === 0 && child.groups.size === 1) child = [...child.groups.values()][0];
      child.parent = parent;
      found.push(child.all.length === 1 ? child.all[0] : child);
    }
    if (parent.units.length > MANY) {
      for (let start = 0; start < parent.units.length; start += RUN) {
        const run = group(parent.path, parent);
        run.units = run.all = parent.units.slice(start, start + RUN);
        run.run = `units ${start + 1} to ${start + run.all.length}`;
        found.push(run);
      }
    } else found.push(...parent.units);
    const first = (item) => (typeof item === "number" ? item : item.all[0]);
    parent.items = found.sort((a, b) => first(a) - first(b));
    return parent.items;
  }
  const labelOf = (one, depth) => (typeof one === "number"
    ? [...pathOf(units[one]).slice(depth), units[one].name.split("/").pop()].join("/")
    : one.run ?? one.path.slice(depth).join("/"));

  function openUpTo(most) {
    let waiting = [root], shown = items(root).length;
    while (waiting.length > 0) {
      const next = [];
      for (const parent of waiting) {
        for (const item of items(parent)) {
          if (typeof item === "number" || open.has(item)) continue;
          const more = items(item).length - 1;
          if (shown + more > most) continue;
          shown += more;
          open.add(item);
          next.push(item);
        }
      }
      waiting = next;
    }
  }

  // --- layout and drawing ---------------------------------------------------------------------------------------
  function visible() {
    const boxes = new Map(), place = new Array(units.length);
    const add = (parent, key, depth) => items(parent).forEach((item, index) => {
      const own = `${key}/${index}`;
      const box = { key: own, item, parent: key === "" ? null : key, label: labelOf(item, depth), inner: 0 };
      boxes.set(own, box);
      if (typeof item === "number") place[item] = own;
      else if (open.has(item)) {
        box.open = true;
        add(item, own, item.path.length);
      } else for (const unit of item.all) place[unit] = own;
    });
    add(root, "", 0);
    const lines = new Map();
    for (const [from, to, elements] of data.edges) {
      const border = units[from].scheme !== units[to].scheme;
      const [a, b] = [place[from], place[to]];
      if (a === b) {
        boxes.get(a).inner += border;
        continue;
      }
      const key = a + " " + b;
      if (!lines.has(key)) lines.set(key, { a, b, tensors: 0, borders: [] });
      const line = lines.get(key);
      line.tensors += 1;
      if (border) {
        const way = `${units[from].scheme.toUpperCase()} to ${units[to].scheme.toUpperCase()}`;
        line.borders.push(`${way}, ${elements.toLocaleString("en")} elements`);
      }
    }
    return { boxes, lines };
  }

  function layout() {
    const { boxes, lines } = visible();
    const graph = new dagre.graphlib.Graph({ compound: true });
    graph.setGraph({ rankdir: "TB", nodesep: 22, ranksep: 46, marginx: 10, marginy: 14 });
    graph.setDefaultEdgeLabel(() => ({}));
    for (const box of boxes.values()) {
      graph.setNode(box.key, box.open ? {} : { width: WIDTH, height: typeof box.item === "number" ? 44 : 56 });
      if (box.parent !== null) graph.setParent(box.key, box.parent);
    }
    for (const line of lines.values()) graph.setEdge(line.a, line.b);
    dagre.layout(graph);
    size = graph.graph();
    const svg = draw("svg", { viewBox: `0 0 ${size.width} ${size.height}`, class: "graph" });
    for (const box of boxes.values()) if (box.open) svg.append(cluster(box, graph.node(box.key)));
    for (const line of lines.values()) svg.append(arrow(line, graph.edge(line.a, line.b).points));
    for (const box of boxes.values()) if (!box.open) svg.append(closed(box, graph.node(box.key)));
    frame.replaceChildren(svg);
    zoom(scale);
    byId("graph-count").textContent = `${boxes.size} boxes for ${counted(units.length, "unit")}`;
  }

  function arrow(line, points) {
    const middle = points.slice(1, -1).map((p) => `L${p.x} ${p.y}`).join("");
    const [start, end] = [points[0], points[points.length - 1]];
    const part = draw("g", { class: line.borders.length > 0 ? "edge border" : "edge" });
    const path = `M${start.x} ${start.y}${middle}L${end.x} ${end.y}`;
    part.append(draw("path", { d: path }));
    part.append(draw("path", { d: `M${end.x - 4} ${end.y - 7}L${end.x} ${end.y}L${end.x + 4} ${end.y - 7}z`, class: "tip" }));
    if (line.borders.length > 0) {
      const listed = line.borders.slice(0, 8).join("\n") + (line.borders.length > 8 ? "\n…" : "");
      part.append(draw("path", { d: path, class: "wide", "data-tip": `${counted(line.borders.length, "border")}\n${listed}` }));
    }
    return part;
  }

  function activate(node, label, act) {
    node.setAttribute("tabindex", "0");
    node.setAttribute("role", "button");
    node.setAttribute("aria-label", label);
    node.addEventListener("click", act);
    node.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== " ") return;
      event.preventDefault();
      act();
    });
  }

  function toggle(item) {
    if (open.has(item)) open.delete(item);
    else open.add(item);
    layout();
    const again = [...frame.querySelectorAll("[data-region]")].find((node) => node.item === item);
    again?.focus({ preventScroll: true });
    again?.scrollIntoView({ block: "nearest", inline: "nearest" });
  }

  function cluster(box, at) {
    const [x, y] = [at.x - at.width / 2, at.y - at.height / 2 - HEAD];
    const part = draw("g", { class: "cluster" });
    part.append(draw("rect", { x, y, width: at.width, height: at.height + HEAD, rx: 8 }));
    const head = draw("g", { class: "head", "data-region": "" });
    head.append(draw("rect", { x: x + 3, y: y + 3, width: Math.min(at.width - 6, 12 + 7.2 * (box.label.length + 2)), height: 20, rx: 5 }));
    head.append(draw("text", { x: x + 9, y: y + 17 }, "▾ " + box.label));
    head.item = box.item;
    activate(head, `▾ ${box.label}, close region`, () => toggle(box.item));
    part.append(head);
    return part;
  }

  function closed(box, at) {
    const part = draw("g", { transform: `translate(${at.x - at.width / 2} ${at.y - at.height / 2})` });
    if (typeof box.item === "number") return unitBox(part, box, at);
    const members = box.item.all.map((index) => units[index]);
    const times = members.map(timeOf);
    const whole = times.every((us) => us === null) ? null : times.reduce((sum, us) => sum + (us ?? 0), 0);
    const shares = data.planned.map((name) => members.filter((unit) => unit.scheme === name).length);
    const told = data.planned.map((name, index) => (shares[index] ? `${shares[index]} ${name.toUpperCase()}` : "")).filter(Boolean).join(", ");
    part.setAttribute("class", "node region");
    part.setAttribute("data-region", "");
    part.item = box.item;
    part.append(draw("rect", { width: at.width, height: at.height, rx: 7, class: "body" }));
    let x = 8;
    shares.forEach((count, index) => {
      if (count === 0) return;
      const width = ((at.width - 16) * count) / members.length;
      part.append(draw("rect", { x, y: 44, width, height: 6, class: `s${index % COLOURS}` }));
      x += width;
    });
    const lines = ["▸ " + short(box.label), `${counted(members.length, "unit")} · ${microseconds(whole)}`];
    part.append(draw("text", { x: 8, y: 18, class: "name" }, lines[0]), " ", draw("text", { x: 8, y: 35 }, lines[1]));
    const inner = box.inner ? `\n${counted(box.inner, "border")} inside` : "";
    part.setAttribute("data-tip", `${box.item.run ?? box.item.path.join("/")}\n${told}\n${microseconds(whole)} ${data.timing}${inner}`);
    activate(part, `${lines.join(" ")}, ${told}: open region ${box.label}`, () => toggle(box.item));
    return part;
  }

  function unitBox(part, box, at) {
    const unit = units[box.item];
    part.setAttribute("class", `node unit s${colourOf(unit)}` + (box.item === chosen ? " chosen" : ""));
    part.setAttribute("data-unit", box.item);
    part.append(draw("rect", { width: at.width, height: at.height, rx: 7, class: "body" }));
    part.append(draw("rect", { width: 6, height: at.height, class: "side" }));
    const lines = [short(box.label), `${unit.scheme.toUpperCase()} · ${microseconds(timeOf(unit))}`];
    part.append(draw("text", { x: 13, y: 18, class: "name" }, lines[0]), " ", draw("text", { x: 13, y: 35 }, lines[1]));
    part.setAttribute("data-tip", `${unit.name}\n${unit.scheme.toUpperCase()}, ${microseconds(timeOf(unit))} ${data.timing}`);
    activate(part, `${lines.join(" ")}, unit ${unit.name}`, () => select(box.item));
    return part;
  }

  // --- one unit -------------------------------------------------------------------------------------------------
  function select(index) {
    chosen = index;
    for (const node of frame.querySelectorAll(".unit")) node.classList.toggle("chosen", Number(node.dataset.unit) === index);
    const unit = units[index];
    const list = make("dl");
    const add = (name, value) => value && list.append(make("dt", {}, name), make("dd", {}, value));
    add("Kind", unit.kind);
    add("Region", unit.region);
    add("Planned scheme", unit.scheme.toUpperCase());
    unit.times.forEach((us, at) => add(`Time ${data.schemes[at].toUpperCase()}`, us !== null && `${microseconds(us)}, ${data.timing}`));
    const number = (value) => value.toFixed(1).replace("-", "−");
    unit.sqnr.forEach((numbers, at) => add(`SQNR alone, ${data.heads[at]}`, numbers === null ? "unknown: nothing to round"
      : numbers[0] >= data.ceiling ? "no error" : `${number(numbers[0])} dB, 95 % interval ${number(numbers[1])} to ${number(numbers[2])}`));
    add("Reason", unit.reason);
    const ends = data.edges.filter(([from, to]) => (from === index || to === index) && units[from].scheme !== units[to].scheme);
    add("Borders", ends.length === 0 ? "none" : ends.map(([from, to]) => (to === index ? `from ${units[from].name} (${units[from].scheme.toUpperCase()})`
      : `to ${units[to].name} (${units[to].scheme.toUpperCase()})`)).join("; "));
    const link = make("button", { type: "button" }, "Show its row in the table");
    link.addEventListener("click", () => document.dispatchEvent(new CustomEvent("show-unit", { detail: unit.name })));
    card.replaceChildren(make("h3", {}, unit.name), list, link);
  }

  function find(text) {
    const words = text.toLowerCase().split(/\s+/).filter(Boolean);
    const hit = words.length === 0 ? -1 : units.findIndex((unit) => {
      const all = `${unit.name}\n${unit.kind}\n${unit.region}`.toLowerCase();
      return words.every((word) => all.includes(word));
    });
    byId("graph-found").textContent = words.length > 0 && hit < 0 ? "no unit has these words" : "";
    if (hit < 0) return;
    for (let at = root; at !== undefined; at = items(at).find((item) => typeof item !== "number" && item.all.includes(hit))) open.add(at);
    layout();
    select(hit);
    frame.querySelector(`[data-unit="${hit}"]`).scrollIntoView({ block: "center", inline: "center" });
  }

  // --- zoom and pan: the frame scrolls, so wheel, touch and arrow keys pan by themselves ------------------------
  function zoom(to, event) {
    const svg = frame.firstElementChild;
    const before = scale;
    scale = Math.min(Math.max(to, 0.1), 3);
    svg.setAttribute("width", size.width * scale);
    svg.setAttribute("height", size.height * scale);
    if (!event) return;
    const box = frame.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    frame.scrollLeft = ((frame.scrollLeft + x) * scale) / before - x;
    frame.scrollTop = ((frame.scrollTop + y) * scale) / before - y;
  }
  const middle = () => {
    const box = frame.getBoundingClientRect();
    return { clientX: box.left + box.width / 2, clientY: box.top + box.height / 2 };
  };
  frame.addEventListener("wheel", (event) => {
    if (!event.ctrlKey && !event.metaKey) return;
    event.preventDefault();
    zoom(scale * Math.exp(-event.deltaY / 300), event);
  }, { passive: false });
  let drag = null;
  frame.addEventListener("pointerdown", (event) => {
    if (event.pointerType === "mouse" && event.button === 0) drag = { x: event.clientX, y: event.clientY, left: frame.scrollLeft, top: frame.scrollTop };
  });
  window.addEventListener("pointermove", (event) => {
    if (drag === null) return;
    frame.scrollLeft = drag.left + drag.x - event.clientX;
    frame.scrollTop = drag.top + drag.y - event.clientY;
  });
  window.addEventListener("pointerup", () => { drag = null; });

  byId("graph-in").addEventListener("click", () => zoom(scale * 1.3, middle()));
  byId("graph-out").addEventListener("click", () => zoom(scale / 1.3, middle()));
  byId("graph-fit").addEventListener("click", () => zoom(Math.min(frame.clientWidth / size.width, frame.clientHeight / size.height)));
  byId("graph-open").addEventListener("click", () => { openUpTo(MOST); layout(); });
  byId("graph-close").addEventListener("click", () => { open.clear(); layout(); });
  byId("graph-search").addEventListener("change", (event) => find(event.target.value));

  byId("graph-details").addEventListener("toggle", (event) => {
    if (!event.target.open || data !== undefined) return;
    data = JSON.parse(byId("data").textContent);
    units = data.scopes.unit;
    root = tree();
    openUpTo(START);
    layout();
    zoom(Math.max(Math.min(frame.clientWidth / size.width, 1), 0.6));
    frame.scrollLeft = (frame.scrollWidth - frame.clientWidth) / 2;
  });
})();
