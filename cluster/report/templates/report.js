"use strict";
// The rollout browser. Model text is hostile: it only ever becomes text nodes.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const form = document.getElementById("filters");
  if (!form) return;
  const list = document.getElementById("list");
  const detail = document.getElementById("detail");
  const status = document.getElementById("status");
  const all = data.rollouts;
  const tasks = [...new Set(all.map((r) => r.task))].sort(byCode);
  const arms = [...new Set(all.map((r) => r.arm || ""))].filter(Boolean).sort(byCode);
  const terms = [...new Set(all.flatMap((r) => r.terms.map((t) => t[0])))].sort(byCode);
  const defects = [...new Set(all.flatMap((r) => r.defects))].sort(byCode);
  const GLYPHS = ["● ●", "● ○", "○ ●", "○ ○", "?"];
  const byProblem = new Map();
  for (const r of all) {
    if (!byProblem.has(r.problem)) byProblem.set(r.problem, []);
    byProblem.get(r.problem).push(r);
    r.words = [r.id, r.problem, r.prompt, ...r.pieces.map((p) => p[1])].join("\n").toLowerCase();
  }
  const elsewhere = (r) => byProblem.get(r.problem).filter((o) => o.step !== r.step || o.arm !== r.arm);
  const whence = (r) => visible((r.arm ? `${r.arm}, ` : "") + `step ${r.step}`);
  let found = [];
  let at = -1;

  // Python sorts text by code point, JavaScript by UTF-16 unit; the form's values are places.
  function byCode(a, b) {
    const x = [...a], y = [...b];
    for (let i = 0; i < Math.min(x.length, y.length); i++) {
      const d = x[i].codePointAt(0) - y[i].codePointAt(0);
      if (d) return d;
    }
    return x.length - y.length;
  }

  function make(tag, attributes = {}, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    node.append(...children);
    return node;
  }

  // Control, bidirectional, invisible and unassigned characters are shown as escapes.
  const HIDDEN = /(?!\n)[\p{C}\p{Zl}\p{Zp}\p{Default_Ignorable_Code_Point}]/gu;
  function visible(text) {
    const out = document.createDocumentFragment();
    let last = 0;
    for (const match of text.matchAll(HIDDEN)) {
      out.append(text.slice(last, match.index));
      const code = match[0].codePointAt(0).toString(16);
      out.append(make("span", { class: "esc" }, code.length > 4 ? `\\u{${code}}` : `\\u${code.padStart(4, "0")}`));
      last = match.index + match[0].length;
    }
    out.append(text.slice(last));
    return out;
  }

  // The namespace is taken from a drawing of the page: no address is written here.
  const parsed = new DOMParser().parseFromString("<svg></svg>", "text/html");
  const SVG = parsed.querySelector("svg").namespaceURI;
  function draw(tag, attributes, text) {
    const node = document.createElementNS(SVG, tag);
    for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
    if (text !== undefined) node.append(visible(String(text)));
    return node;
  }

  function drawGrid(figure) {
    const n = figure.cells.length, side = 40, whole = n * side;
    const svg = draw("svg", { viewBox: `-2 -2 ${whole + 4} ${whole + 4}`, "aria-hidden": "true" });
    const hasGiven = figure.cells.flat().some((c) => c.given);
    const marks = [];
    figure.cells.forEach((row, r) => row.forEach((cell, c) => {
      const x = c * side, y = r * side;
      svg.append(draw("rect", { x, y, width: side, height: side, class: "gridline" }));
      if (cell.bad) marks.push(draw("rect", { x: x + 2, y: y + 2, width: side - 4, height: side - 4, class: "badcell" }));
      const kind = cell.bad ? "baddigit" : hasGiven && !cell.given ? "plain" : cell.given ? "given" : "";
      marks.push(draw("text", { x: x + side / 2, y: y + side / 2 + 1, "font-size": 21, class: `digit ${kind}` }, cell.v));
      if (cell.true) marks.push(draw("text", { x: x + side - 5, y: y + 13, class: "true" }, cell.true));
    }));
    for (let i = 0; i <= n; i += figure.box) {
      const d = i * side;
      svg.append(draw("path", { d: `M0 ${d}H${whole}M${d} 0V${whole}`, class: "boxline" }));
    }
    svg.append(...marks);
    return svg;
  }

  function drawGraph(figure) {
    const n = figure.labels.length, size = 240, mid = size / 2, radius = mid - 26;
    const place = (v) => {
      const angle = (2 * Math.PI * v) / n - Math.PI / 2;
      return [mid + radius * Math.cos(angle), mid + radius * Math.sin(angle)];
    };
    const svg = draw("svg", { viewBox: `0 0 ${size} ${size}`, "aria-hidden": "true" });
    for (const [i, j, mark] of figure.edges) {
      const [x1, y1] = place(i), [x2, y2] = place(j);
      svg.append(draw("line", { x1, y1, x2, y2, class: `edge ${mark}` }));
      if (mark === "extra" || mark === "clash") {
        const x = x1 + (x2 - x1) * 0.42, y = y1 + (y2 - y1) * 0.42, s = 6;
        svg.append(draw("path", { d: `M${x - s} ${y - s}L${x + s} ${y + s}M${x - s} ${y + s}L${x + s} ${y - s}`, class: "cross" }));
      }
    }
    const letters = [...new Set((figure.colors || []).filter(Boolean))].sort();
    figure.labels.forEach((label, v) => {
      const [x, y] = place(v);
      const color = figure.colors && figure.colors[v] ? ` node${letters.indexOf(figure.colors[v])}` : "";
      svg.append(draw("circle", { cx: x, cy: y, r: figure.colors ? 17 : 14, class: `node${color}` }));
      svg.append(draw("text", { x, y: y + 0.5, "font-size": figure.colors ? 12 : 14, class: "digit" }, label));
    });
    return svg;
  }

  function drawWords(figure) {
    const pre = make("pre", { class: "piece" });
    const tags = { right: "span", missing: "del", extra: "ins" };
    for (const [mark, text] of figure.rows) {
      const signs = { right: "", missing: "−", extra: "+" };
      const node = make(tags[mark] || "span", {}, signs[mark] || "");
      node.append(visible(text));
      pre.append(node, " ");
    }
    return pre;
  }

  function figure(title, drawn, caption, kind = "") {
    const node = make("figure", { class: kind }, make("h4", {}, title), drawn);
    if (caption) { const c = make("figcaption"); c.append(visible(caption)); node.append(c); }
    return node;
  }

  function drawing(title, f, none) {
    if (!f) return figure(title, make("p", { class: "lost" }, none));
    const drawn = f.kind === "grid" ? drawGrid(f) : f.kind === "graph" ? drawGraph(f) : drawWords(f);
    return figure(title, drawn, f.text, f.kind);
  }

  function badge(text, kind) { return make("span", { class: `badge ${kind}` }, text); }
  const number = (x) => (x === null ? "–" : String(Math.round(x * 1e4) / 1e4));

  function rows(title, pairs) {
    const body = make("tbody");
    for (const [name, value] of pairs) {
      const head = make("th", { scope: "row" });
      head.append(visible(name));
      body.append(make("tr", {}, head, make("td", { class: "r" }, value)));
    }
    return make("div", {}, make("h4", {}, title), make("table", {}, body));
  }

  function show(r) {
    const node = make("article", { class: "rollout" });
    const head = make("h3");
    head.append(whence(r), " · ", visible(r.task));
    const meta = make("p", { class: "meta" });
    meta.append(visible(r.id), ` · policy version ${r.version} · ${r.kind} · ended by `, visible(r.finish));
    const saw = r.saw, thought = r.thought;
    const badges = make("div", { class: "badges" });
    const word = (what, ok, kind) =>
      ok === null ? badge(`? ${what} not judged`, "plain") : badge(`${ok ? "✓" : "✗"} ${what} ${ok ? "right" : "wrong"}`, ok ? kind : "bad");
    badges.append(word("saw", saw, "perception"), word("thought", thought, "reasoning"), word("answered", r.a, "answer"));
    if (r.leak) badges.append(badge("leak: right in spite of wrong seeing", "plain"));
    if (r.graded !== null && !saw) badges.append(badge(`seeing graded ${number(r.graded)}`, "plain"));
    if (r.note) badges.append(badge(r.note, "plain"));
    for (const d of r.defects) { const b = badge("", "bad"); b.append("defect ", visible(d)); badges.append(b); }
    node.append(head, meta, badges);

    const views = make("div", { class: "views" });
    r.images.forEach((hash, i) => {
      const title = r.images.length > 1 ? `Image ${i + 1}` : "Image";
      const source = data.images[hash];
      if (source) {
        const holds = r.true ? ` It holds: ${r.true.slice(0, 400)}` : "";
        const image = make("img", { alt: `${title} of the problem.${holds}` });
        image.src = source;
        views.append(figure(title, image, ""));
      } else views.append(figure(title, make("p", { class: "lost" }, "not in this file")));
    });
    views.append(drawing("What it saw", r.figure, "unreadable or missing"));
    if (r.answered) views.append(drawing("What it answered", r.answered, ""));
    node.append(views);

    // Of arms one of each cell: they answered the same problem many times.
    const again = elsewhere(r).filter((o, i, found) => !r.arm
      || found.findIndex((p) => p.arm === o.arm && p.cell === o.cell) === i);
    if (again.length) {
      const bar = make("div", { class: "again" }, `The same problem ${r.arm ? "in" : "at"}: `);
      for (const other of again.slice(0, r.arm ? 40 : 12)) {
        const button = make("button", { type: "button" }, whence(other), ` ${GLYPHS[other.cell]}`);
        button.addEventListener("click", () => compare(r, other));
        bar.append(button);
      }
      node.append(bar);
    }

    const response = make("div", { class: "response" }, make("h4", {}, "Response"));
    for (const [segment, text] of r.pieces) {
      const piece = make("div", { class: `piece ${segment}` }, make("div", { class: "name" }, segment || "outside every segment"));
      const pre = make("pre");
      pre.append(visible(text));
      piece.append(pre);
      response.append(piece);
    }
    node.append(response);
    if (r.turns.length) node.append(turns(r));

    const numbers = make("div", { class: "numbers" });
    numbers.append(
      rows("Reward", [...r.terms.map(([n, v]) => [n, number(v)]), ["total", number(r.total)]]),
      rows("Advantage", r.advantages.map(([n, v]) => [n, number(v)])),
      rows("Tokens", Object.entries(r.tokens).map(([n, v]) => [n, String(v)])),
    );
    node.append(numbers);
    for (const [title, text] of [["Prompt", r.prompt], ...(r.true ? [["What there was to see", r.true]] : []), ...r.failures.map((f) => ["Failure", f])]) {
      const pre = make("pre", { class: "piece" });
      pre.append(visible(text));
      node.append(make("details", {}, make("summary", {}, title), pre));
    }
    return node;
  }

  // The turns of a response with an environment; a call's box on the picture that it points at.
  function turns(r) {
    const node = make("div", { class: "response" }, make("h4", {}, "Turn by turn"));
    r.turns.forEach((turn, i) => {
      const said = (name, text) => {
        const piece = make("div", { class: "piece" }, make("div", { class: "name" }, name));
        const pre = make("pre");
        pre.append(visible(text));
        piece.append(pre);
        node.append(piece);
      };
      said(`Turn ${i + 1}: the policy`, turn.text);
      for (const d of turn.defects) { const b = badge("", "bad"); b.append("call ", visible(d)); node.append(b); }
      const views = make("div", { class: "views" });
      const picture = (hash, alt) => {
        const image = make("img", { alt });
        image.src = data.images[hash];
        return image;
      };
      if (turn.call) {
        const [place, x0, y0, x1 = x0, y1 = y0] = turn.call;
        if (data.images[r.images[place]]) {
          const box = make("div", { class: "box" });
          Object.assign(box.style, { left: `${x0 / 10}%`, top: `${y0 / 10}%`, width: `${(x1 - x0) / 10}%`, height: `${(y1 - y0) / 10}%` });
          const where = make("div", { class: "boxed" }, picture(r.images[place], "The picture that the call points at"), box);
          views.append(figure(`Called: ${turn.call.slice(1).join(" ")}`, where, ""));
        }
      }
      turn.images.forEach((hash) => {
        if (data.images[hash]) views.append(figure("Shown", picture(hash, "What the environment returned"), ""));
      });
      if (views.childNodes.length) node.append(views);
      if (turn.said) said("The environment", turn.said);
      if (turn.reward) node.append(make("p", { class: "meta" }, `reward ${number(turn.reward)}`));
    });
    return node;
  }

  function compare(one, other) {
    const pair = [one, other].sort((a, b) => a.step - b.step);
    const back = make("button", { type: "button" }, "Back to one");
    back.addEventListener("click", () => { detail.replaceChildren(show(one)); detail.focus(); });
    detail.replaceChildren(
      make("div", { class: "again" }, "The same problem: ", whence(pair[0]), " and ", whence(pair[1]), ". ", back),
      make("div", { class: "pair" }, show(pair[0]), show(pair[1])),
    );
    detail.focus();
  }

  function select(place, scroll = true) {
    if (at >= 0 && list.children[at]) list.children[at].setAttribute("aria-selected", "false");
    at = Math.max(0, Math.min(place, found.length - 1));
    const row = list.children[at];
    document.getElementById("previous").disabled = at <= 0;
    document.getElementById("next").disabled = at >= found.length - 1;
    if (!row) {
      list.removeAttribute("aria-activedescendant");
      detail.replaceChildren(make("p", { class: "lost" }, "No rollout passes these filters."));
      return;
    }
    row.setAttribute("aria-selected", "true");
    list.setAttribute("aria-activedescendant", row.id);
    if (scroll) list.scrollTop += row.getBoundingClientRect().top < list.getBoundingClientRect().top
      ? row.getBoundingClientRect().top - list.getBoundingClientRect().top
      : Math.max(0, row.getBoundingClientRect().bottom - list.getBoundingClientRect().bottom);
    detail.replaceChildren(show(found[at]));
  }

  function passes(r, f) {
    if (!f.cells.has(r.cell) || r.step < f.from || r.step > f.to) return false;
    if (f.arm !== null && r.arm !== f.arm) return false;
    if (f.task !== null && r.task !== f.task) return false;
    if (f.answer === "right" && r.a !== true) return false;
    if (f.answer === "wrong" && r.a !== false) return false;
    if (f.answer === "leak" && r.leak !== true) return false;
    if (f.defect === "none" && r.defects.length) return false;
    if (f.defect === "some" && !r.defects.length) return false;
    if (f.named !== null && !r.defects.includes(f.named)) return false;
    if (f.value !== null) {
      const pair = f.term === null ? [0, r.total] : r.terms.find((t) => t[0] === f.term);
      if (!pair || pair[1] === null) return false;
      if (f.compare === "ge" ? pair[1] < f.value : pair[1] > f.value) return false;
    }
    if (f.again && !elsewhere(r).length) return false;
    return !f.text || r.words.includes(f.text);
  }

  function filter() {
    const field = (name) => (form.elements[name] ? form.elements[name].value : "");
    const place = (name, from) => (/^\d+$/.test(field(name)) ? from[Number(field(name))] : null);
    const f = {
      cells: new Set([...form.querySelectorAll("[name=cell]:checked")].map((b) => Number(b.value))),
      from: Number(field("from")), to: Number(field("to")), arm: place("arm", arms), task: place("task", tasks),
      answer: field("answer"), defect: field("defect"), named: place("defect", defects),
      term: place("term", terms), compare: field("compare"),
      value: field("value") === "" ? null : Number(field("value")),
      again: form.elements.again.checked, text: field("text").toLowerCase(),
    };
    const before = found[at];
    found = all.filter((r) => passes(r, f));
    list.replaceChildren(...found.map((r, i) => {
      const sub = make("span", { class: "sub" });
      sub.append(visible(r.task), r.defects.length ? ` · ${r.defects.length} ${r.defects.length > 1 ? "defects" : "defect"}` : "", r.note ? ` · ${r.note}` : "");
      const row = make("li", { role: "option", id: `r${i}`, "aria-selected": "false" },
        make("span", { class: "glyph", title: data.cells[r.cell], "aria-label": data.cells[r.cell] }, GLYPHS[r.cell]),
        make("span", {}, whence(r), r.a ? " ✓" : " ✗"), make("span", { class: "num" }, number(r.total)), sub);
      row.addEventListener("click", () => select(i, false));
      return row;
    }));
    status.textContent = `${found.length} of ${all.length} rollouts. ● right, ○ wrong: first seeing, then thinking; ✓ or ✗ the answer; the number is the total reward.`;
    at = -1;
    select(Math.max(0, found.indexOf(before)));
  }

  const STEPS = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -1e9, End: 1e9 };
  list.addEventListener("keydown", (event) => {
    if (!(event.key in STEPS) || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    select(at + STEPS[event.key]);
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest("input, select, textarea")) return;
    if (event.key === "j") select(at + 1);
    if (event.key === "k") select(at - 1);
  });
  document.getElementById("previous").addEventListener("click", () => select(at - 1));
  document.getElementById("next").addEventListener("click", () => select(at + 1));
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("input", filter);
  form.addEventListener("reset", () => setTimeout(filter));
  for (const node of [form, status, document.getElementById("browser")]) node.hidden = false;
  filter();
})();
