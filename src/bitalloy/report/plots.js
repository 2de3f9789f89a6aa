"use strict";
// Charts drawn with Observable Plot, as wide as their place: points can be reached with the keyboard.
// Foreign names reach the page only through textContent, attributes and Plot's own text, never as markup.
(() => {
  const byId = (id) => document.getElementById(id);
  const data = JSON.parse(byId("plots").textContent);
  const NARROW = 560;
  const REACH = 2.5; // whiskers are shown up to this multiple of the longest bar
  const SHAPES = {
    dot: { symbol: "circle", r: 3.5, filled: true }, seen: { symbol: "diamond", r: 4.5, filled: true },
    chosen: { symbol: "circle", r: 7, filled: false }, mixed: { symbol: "diamond", r: 7.5, filled: true },
    lowest: { symbol: "square", r: 6, filled: true }, "lowest-predicted": { symbol: "square", r: 5.5, filled: false },
    off: { symbol: "triangle", r: 5, filled: false },
  };

  // Points of one chart, a mark for each shape; what they say and do is put on afterwards.
  const dots = (points, x, y) => Object.entries(SHAPES).map(([name, shape]) => Plot.dot(points, {
    filter: (point) => point.shape === name, x, y, symbol: shape.symbol, r: shape.r,
    fill: shape.filled ? "var(--accent)" : "var(--panel)", stroke: shape.filled ? "var(--panel)" : "var(--accent)",
    strokeWidth: shape.filled ? 1 : 2,
  }));

  function finish(svg, title, points, act) {
    svg.setAttribute("role", "group");
    svg.setAttribute("aria-label", title);
    for (const group of svg.querySelectorAll('g[aria-label="dot"], g[aria-label="bar"]')) {
      group.removeAttribute("aria-label");
      for (const node of group.children) {
        const point = points[node.__data__];
        node.setAttribute("data-tip", point.tip);
        node.setAttribute("tabindex", "0");
        node.setAttribute("role", act ? "button" : "img");
        node.setAttribute("aria-label", point.tip);
        if (!act) continue;
        node.addEventListener("click", () => act(point));
        node.addEventListener("keydown", (event) => {
          if (event.key !== "Enter" && event.key !== " ") return;
          event.preventDefault();
          act(point);
        });
      }
    }
    for (const group of svg.querySelectorAll("g[aria-label]")) group.removeAttribute("aria-label");
    return svg;
  }

  function padded(values, share) {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const pad = (high - low) * share || Math.abs(high) * 0.1 || 1;
    return [low - pad, high + pad];
  }

  // --- the front ------------------------------------------------------------------------------------------------
  let view = data.views[0];
  function front(width) {
    const inside = view.points.filter((point) => view.ceiling === null || point.y <= view.ceiling);
    const ends = inside.flatMap((point) => [point.y, point.low ?? point.y, point.high ?? point.y]);
    const y = padded([...ends, ...(view.limit === null ? [] : [view.limit])], 0.06);
    const points = view.points.map((point) => (inside.includes(point) ? point : { ...point, y: y[1], shape: "off", low: null }));
    const x = padded([...points.map((point) => point.x), ...(data.ratio_limit === null ? [] : [data.ratio_limit])], 0.03);
    const joined = d3.groups(points.filter((point) => point.pair !== null && point.shape !== "off"), (point) => point.pair)
      .filter(([, pair]) => pair.length === 2).map(([, pair]) => pair);
    const line = points.filter((point) => point.shape === "dot" && point.plan !== "");
    const svg = Plot.plot({
      className: "plot", width, height: width < NARROW ? 380 : 440, marginLeft: 52, marginBottom: 42, marginTop: 26,
      style: { background: "transparent", color: "inherit", fontSize: "12.5px", overflow: "visible" },
      x: { domain: x, label: width < NARROW ? "Latency over float (left is faster)" : "Latency, ratio to the float model (left is faster)", grid: true, ticks: Math.min(8, width / 70), labelArrow: "none", labelAnchor: "center" },
      y: { domain: y, label: view.label, grid: true, labelArrow: "none" },
      marks: [
        data.ratio_limit === null ? null : Plot.ruleX([data.ratio_limit], { stroke: "var(--bad)", strokeDasharray: "5 4" }),
        data.ratio_limit === null ? null : Plot.text([data.ratio_limit], { x: (v) => v, frameAnchor: "bottom", dx: 4, dy: -5, textAnchor: "start", text: (v) => `budget ${v.toFixed(2)}×`, fill: "var(--bad)" }),
        view.limit === null ? null : Plot.ruleY([view.limit], { stroke: "var(--bad)", strokeDasharray: "5 4" }),
        view.limit === null ? null : Plot.text([view.limit], { y: (v) => v, frameAnchor: "right", dy: -7, text: (v) => `${view.limit_text} ${v}`, fill: "var(--bad)" }),
        Plot.line(line, { x: "x", y: "y", stroke: "var(--accent)", strokeOpacity: 0.6, strokeWidth: 1.5, curve: "linear" }),
        Plot.link(joined, { x1: (p) => p[0].x, y1: (p) => p[0].y, x2: (p) => p[1].x, y2: (p) => p[1].y, stroke: "var(--accent)", strokeDasharray: "3 3" }),
        Plot.ruleX(points.filter((point) => point.low !== null && point.high !== null), { x: "x", y1: "low", y2: "high", stroke: "var(--accent)", strokeWidth: 1.5 }),
        ...dots(points, "x", "y"),
      ],
    });
    return finish(svg, `Plans by latency and ${view.name}; the table below holds the same numbers.`, points, tell);
  }

  function tell(point) {
    const card = byId("plan-card");
    card.hidden = false;
    const lines = [point.tip.replace("\n", "; "), point.plan].filter(Boolean).map((text) => {
      const line = document.createElement("p");
      line.textContent = text;
      return line;
    });
    if (point.command) {
      const line = document.createElement("p");
      const code = document.createElement("code");
      code.textContent = point.command;
      line.append("Command: ", code);
      lines.push(line);
    }
    card.replaceChildren(...lines);
  }

  // --- latency --------------------------------------------------------------------------------------------------
  function latency(width) {
    const most = Math.min(Math.max(...data.bars.map((bar) => bar.high)), REACH * Math.max(...data.bars.map((bar) => bar.median)));
    const top = Math.max(most, data.limit_ms ?? 0) * 1.02;
    const narrow = width < NARROW;
    const svg = Plot.plot({
      className: "plot", width, height: 44 * data.bars.length + 70, marginLeft: 104, marginRight: narrow ? 14 : 130, marginTop: 24, marginBottom: 40,
      style: { background: "transparent", color: "inherit", fontSize: "12.5px", overflow: "visible" },
      x: { domain: [0, top], label: "Latency of one inference, ms", grid: true, labelArrow: "none", labelAnchor: "center", ticks: Math.min(8, width / 80) },
      y: { domain: data.bars.map((bar) => bar.name), label: null, tickSize: 0 },
      marks: [
        Plot.barX(data.bars, { y: "name", x: "median", fill: (bar) => (bar.mixed ? "var(--accent)" : "var(--h7)"), fillOpacity: 0.8, insetTop: narrow ? 18 : 6, insetBottom: narrow ? 2 : 6 }),
        Plot.ruleY(data.bars, { y: "name", dy: narrow ? 8 : 0, x1: "low", x2: (bar) => Math.min(bar.high, top), stroke: "var(--text)", strokeWidth: 1.5 }),
        Plot.tickX(data.bars.filter((bar) => bar.high <= top), { y: "name", dy: narrow ? 8 : 0, x: "high", inset: 14, stroke: "var(--text)" }),
        Plot.text(data.bars.filter((bar) => bar.high > top), { y: "name", x: () => top, dy: -13, textAnchor: "end", text: (bar) => `p90 ${bar.high.toPrecision(3)} ms →` }),
        Plot.text(data.bars, narrow ? { y: "name", x: () => 0, dx: 2, dy: -14, textAnchor: "start", text: "label" } : { y: "name", frameAnchor: "right", dx: 12, textAnchor: "start", text: "label" }),
        data.limit_ms === null ? null : Plot.ruleX([data.limit_ms], { stroke: "var(--bad)", strokeDasharray: "5 4" }),
        data.limit_ms === null ? null : Plot.text([data.limit_ms], { x: (v) => v, frameAnchor: "top", dy: -14, text: (v) => `budget ${v.toPrecision(4)} ms`, fill: "var(--bad)" }),
      ],
    });
    return finish(svg, `Median latency: ${data.bars.map((bar) => bar.label).join("; ")}`, data.bars, null);
  }

  // --- predicted against measured -------------------------------------------------------------------------------
  function checks(width) {
    const domain = padded(data.checks.flatMap((point) => [point.x, point.y]), 0.05);
    const side = Math.min(width, 520);
    const svg = Plot.plot({
      className: "plot", width: side, height: side, marginLeft: 46, marginBottom: 42, marginTop: 26,
      style: { background: "transparent", color: "inherit", fontSize: "12.5px", overflow: "visible" },
      x: { domain, label: "Predicted SQNR, dB", grid: true, labelArrow: "none", labelAnchor: "center", ticks: 7 },
      y: { domain, label: "Measured SQNR, dB", grid: true, labelArrow: "none", ticks: 7 },
      marks: [
        Plot.line([[domain[0], domain[0]], [domain[1], domain[1]]], { stroke: "var(--muted)" }),
        ...[-3, 3].map((gap) => Plot.line([[domain[0], domain[0] + gap], [domain[1], domain[1] + gap]], { stroke: "var(--muted)", strokeDasharray: "3 4", clip: true })),
        ...dots(data.checks, "x", "y"),
      ],
    });
    return finish(svg, "Predicted and measured SQNR", data.checks, null);
  }

  const places = [["front-chart", front], ["latency-chart", latency], ["checks-chart", checks]]
    .filter(([id]) => byId(id) !== null);
  const widths = new Map();
  function redraw(id, make) {
    const place = byId(id);
    const width = Math.max(Math.min(place.clientWidth, 1040), 280);
    widths.set(id, place.clientWidth);
    place.replaceChildren(make(width));
  }
  const observer = new ResizeObserver(() => {
    for (const [id, make] of places) if (byId(id).clientWidth > 0 && widths.get(id) !== byId(id).clientWidth) redraw(id, make);
  });
  for (const [id] of places) observer.observe(byId(id));
  for (const input of document.querySelectorAll('input[name="view"]')) {
    input.addEventListener("change", () => {
      view = data.views[Number(input.value)];
      byId("plan-card").hidden = true;
      redraw("front-chart", front);
    });
  }
})();
