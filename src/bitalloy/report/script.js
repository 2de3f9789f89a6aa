"use strict";
// Foreign names reach the page only through textContent, title and value comparisons, never as markup.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byId = (id) => document.getElementById(id);
  const collator = new Intl.Collator("en", { numeric: true });

  // --- sortable table -------------------------------------------------------------------------------------------
  const table = byId("table");
  const body = table.tBodies[0];
  const headers = [...table.tHead.rows[0].cells];
  const state = { scope: "unit", head: 0, key: "sqnr", direction: 1, region: null, words: [] };
  const SQNR = { sqnr: 0, weights: 3, activations: 4 };

  const make = (tag, className, text) => {
    const node = document.createElement(tag);
    if (className) node.className = className;
    if (text !== undefined) node.textContent = text;
    return node;
  };

  function valueOf(row, key) {
    if (key.startsWith("time-")) return row.times[Number(key.slice(5))];
    if (!(key in SQNR)) return key === "flagged" ? Number(row.flagged) : row[key];
    const numbers = row.sqnr[state.head];
    return numbers ? numbers[SQNR[key]] : null;
  }

  function compare(a, b) {
    const x = valueOf(a, state.key);
    const y = valueOf(b, state.key);
    if (x === null || y === null) return (x === null) - (y === null);
    return state.direction * (typeof x === "string" ? collator.compare(x, y) : x - y);
  }

  function inRegion(row) {
    return state.region === null || state.region === data.root || row.region === state.region
      || row.region.startsWith(state.region + "/");
  }

  function matches(row) {
    if (!inRegion(row)) return false;
    if (state.words.length === 0) return true;
    const text = [row.name, row.kind, row.region, row.scheme, row.reason].join("\n").toLowerCase();
    return state.words.every((word) => text.includes(word));
  }

  const decibel = (value) => (value === null ? "–" : value >= data.ceiling ? "no error" : value.toFixed(1).replace("-", "−"));
  const time = (value) => (value === null ? "–" : value.toFixed(value >= 100 ? 0 : 1));

  function levelBar(numbers, scale) {
    const place = (value) => Math.min(Math.max((scale.high - value) / (scale.high - scale.low), 0), 1) * 100;
    const bar = make("span", "level");
    const fill = make("i");
    fill.style.width = place(numbers[0]) + "%";
    const whisker = make("b");
    whisker.style.left = place(numbers[2]) + "%";
    whisker.style.width = Math.max(place(numbers[1]) - place(numbers[2]), 0) + "%";
    bar.append(fill, whisker);
    return bar;
  }

  function sqnrCell(numbers, scale) {
    const cell = make("td", "sqnr");
    if (numbers === null) {
      cell.textContent = "–";
    } else if (numbers[0] >= data.ceiling) {
      cell.append(make("span", "interval", "no error"));
    } else {
      cell.append(make("span", "number", decibel(numbers[0])));
      cell.append(make("span", "interval", `[${decibel(numbers[1])}, ${decibel(numbers[2])}]`));
      cell.append(levelBar(numbers, scale));
    }
    return cell;
  }

  function line(row, scale) {
    const tr = make("tr");
    const name = make("td", "text name");
    name.title = row.name;
    name.append(make("bdi", "", row.name));
    const region = make("td", "text region", row.region);
    region.title = row.region;
    const plan = make("td", "text");
    plan.append(make("span", "badge " + row.scheme.replace(/[^a-z0-9]/g, ""), row.scheme.toUpperCase()));
    const numbers = row.sqnr[state.head] ?? null;
    const flag = make("td", "text");
    if (row.flagged) {
      const mark = make("span", "flag", "!");
      mark.title = "outside the linear regime: the number may be off";
      flag.append(mark);
    }
    tr.append(
      name, make("td", "text", row.kind), region, plan, sqnrCell(numbers, scale),
      make("td", "", numbers ? decibel(numbers[3]) : "–"), make("td", "", numbers ? decibel(numbers[4]) : "–"),
      ...row.times.map((us) => make("td", "", time(us))), flag, make("td", "text reason", row.reason),
    );
    tr.setAttribute("role", "row");
    for (const cell of tr.cells) cell.setAttribute("role", "cell");
    return tr;
  }

  // Rows are built once per scope and head; sorting and filtering only move them.
  const built = new Map();
  function rowsOf(scope, head) {
    const key = scope + " " + head;
    if (!built.has(key)) {
      const scale = { low: Infinity, high: -Infinity };
      for (const row of data.scopes[scope]) {
        const numbers = row.sqnr[head];
        if (!numbers || numbers[0] >= data.ceiling) continue;
        scale.low = Math.min(scale.low, numbers[1]);
        scale.high = Math.max(scale.high, numbers[0]);
      }
      if (!(scale.high > scale.low)) scale.high = scale.low + 1;
      built.set(key, new Map(data.scopes[scope].map((row) => [row, line(row, scale)])));
    }
    return built.get(key);
  }

  function show() {
    const rows = rowsOf(state.scope, state.head);
    const kept = data.scopes[state.scope].filter(matches).sort(compare);
    body.replaceChildren(...kept.map((row) => rows.get(row)));
    byId("count").textContent = `${kept.length} of ${data.scopes[state.scope].length}`;
    for (const header of headers) {
      if (header.dataset.key === state.key) header.setAttribute("aria-sort", state.direction > 0 ? "ascending" : "descending");
      else header.removeAttribute("aria-sort");
    }
    const chip = byId("region-filter");
    chip.hidden = state.region === null;
    chip.textContent = `region ${state.region} ✕`;
    chip.title = "Show all regions again";
  }

  for (const header of headers) {
    header.firstElementChild.addEventListener("click", () => {
      state.direction = header.dataset.key === state.key ? -state.direction : 1;
      state.key = header.dataset.key;
      show();
    });
  }
  for (const input of document.querySelectorAll('input[name="scope"], input[name="head"]')) {
    input.addEventListener("change", () => {
      if (input.name === "scope") state.scope = input.value;
      else state.head = Number(input.value);
      show();
    });
  }
  byId("filter").addEventListener("input", (event) => {
    state.words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean);
    show();
  });
  byId("region-filter").addEventListener("click", () => {
    state.region = null;
    show();
  });
  function showUnits(region, text) {
    state.region = region;
    state.scope = "unit";
    state.words = text.toLowerCase().split(/\s+/).filter(Boolean);
    byId("filter").value = text;
    document.querySelector('input[name="scope"][value="unit"]').checked = true;
    show();
    byId("sensitivity").scrollIntoView();
  }
  document.addEventListener("show-unit", (event) => showUnits(null, event.detail));

  // --- region tree ----------------------------------------------------------------------------------------------
  const tree = [...byId("tree").tBodies[0].rows];
  const toggleOf = (row) => row.querySelector(".toggle");
  const isOpen = (row) => toggleOf(row)?.getAttribute("aria-expanded") === "true";

  function refreshTree() {
    for (const row of tree) {
      const parent = row.dataset.parent === "" ? null : tree[Number(row.dataset.parent)];
      row.hidden = parent !== null && (parent.hidden || !isOpen(parent));
    }
  }
  function setOpen(test) {
    for (const row of tree) toggleOf(row)?.setAttribute("aria-expanded", String(test(row)));
    refreshTree();
  }
  for (const row of tree) {
    toggleOf(row)?.addEventListener("click", () => {
      toggleOf(row).setAttribute("aria-expanded", String(!isOpen(row)));
      refreshTree();
    });
    row.querySelector(".link").addEventListener("click", (event) => showUnits(event.currentTarget.dataset.region, ""));
  }
  byId("expand").addEventListener("click", () => setOpen(() => true));
  byId("collapse").addEventListener("click", () => setOpen((row) => row.dataset.level === "0"));

  // --- tooltips of the charts -----------------------------------------------------------------------------------
  const tip = byId("tip");
  document.addEventListener("pointermove", (event) => {
    const owner = event.target instanceof Element ? event.target.closest("[data-tip]") : null;
    tip.hidden = owner === null;
    if (owner === null) return;
    tip.textContent = owner.dataset.tip;
    const box = tip.getBoundingClientRect();
    const beyond = event.clientX + 14 + box.width > document.documentElement.clientWidth;
    tip.style.left = (beyond ? Math.max(event.clientX - 14 - box.width, 4) : event.clientX + 14) + "px";
    tip.style.top = Math.min(event.clientY + 14, document.documentElement.clientHeight - box.height - 4) + "px";
  });
  document.addEventListener("focusin", (event) => {
    const owner = event.target instanceof Element && event.target.matches(":focus-visible") ? event.target.closest("[data-tip]") : null;
    tip.hidden = owner === null;
    if (owner === null) return;
    tip.textContent = owner.dataset.tip;
    const [at, box] = [owner.getBoundingClientRect(), tip.getBoundingClientRect()];
    tip.style.left = Math.min(Math.max(at.left, 4), document.documentElement.clientWidth - box.width - 4) + "px";
    tip.style.top = Math.min(at.bottom + 6, document.documentElement.clientHeight - box.height - 4) + "px";
  });

  window.addEventListener("beforeprint", () => {
    for (const details of document.querySelectorAll("details")) details.open = true;
  });

  setOpen((row) => row.dataset.level === "0");
  show();
})();
