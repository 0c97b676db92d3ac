"use strict";
(() => {
  const PAGE = 12;
  const rollouts = JSON.parse(document.getElementById("data").textContent);
  const form = document.getElementById("filter");
  const list = document.getElementById("groups");
  const more = document.getElementById("more");

  const el = (tag, name, text) => {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text !== undefined && text !== null) node.textContent = text;
    return node;
  };
  const number = (value, digits, sign) =>
    typeof value === "number" ? (sign && value >= 0 ? "+" : "") + value.toFixed(digits) : "-";
  const count = (n, noun) => n + " " + noun + (n === 1 ? "" : "s");
  const sum = (values) => values.reduce((total, value) => total + value, 0);

  const outcome = (r) => {
    if (r.finish_reason && r.finish_reason !== "stop") return "cut";
    if (typeof r.accuracy === "number") return r.accuracy >= 0.5 ? "right" : "wrong";
    return r.reward > 0 ? "right" : "wrong";
  };
  const words = { right: "correct", wrong: "wrong", cut: "cut off" };
  const answered = (c) => c.status === "ok" || c.status === "cached";

  const tip = el("div");
  tip.id = "tip";
  tip.hidden = true;
  tip.setAttribute("role", "tooltip");
  document.body.append(tip);

  const describe = (consult) => {
    const rows = [["query", consult.query], ["status", consult.status], ["reply", consult.text]];
    if (consult.latency) rows.push(["latency", (1000 * consult.latency).toFixed(1) + " ms"]);
    const box = el("dl");
    for (const [name, value] of rows)
      if (value) box.append(el("dt", "", name), el("dd", "", value));
    return box;
  };
  const showTip = (target, consults) => {
    if (!consults.length) return;
    tip.replaceChildren(...consults.map(describe));
    tip.hidden = false;
    const spot = target.getBoundingClientRect();
    const left = Math.min(spot.left, document.documentElement.clientWidth - tip.offsetWidth - 12);
    const below = spot.bottom + 8 + tip.offsetHeight < innerHeight;
    tip.style.left = Math.max(8, left) + scrollX + "px";
    tip.style.top = (below ? spot.bottom + 8 : spot.top - tip.offsetHeight - 8) + scrollY + "px";
  };
  const hideTip = () => { tip.hidden = true; };

  const segment = (part, consults) => {
    const span = el("span", "seg " + (["expert", "notice"].includes(part.kind) ? part.kind : "policy"), part.text);
    if (part.kind === "policy") return span;
    const mine = consults.filter((c) => c.turn === part.turn);
    span.tabIndex = 0;
    span.title = mine.length ? "" : part.kind;
    for (const event of ["mouseenter", "focus"]) span.addEventListener(event, () => showTip(span, mine));
    for (const event of ["mouseleave", "blur"]) span.addEventListener(event, hideTip);
    return span;
  };

  const facts = (r) => {
    const box = el("p", "facts2");
    const kind = outcome(r);
    const line = (...nodes) => {
      const span = el("span");
      span.append(...nodes);
      box.append(span);
    };
    line(el("span", "mark " + kind, words[kind]));
    line("reward ", el("b", "", number(r.reward, 2)));
    if (typeof r.advantage === "number" && r.split !== "eval")
      line("advantage ", el("b", r.advantage > 0 ? "right" : r.advantage < 0 ? "wrong" : "", number(r.advantage, 2, true)));
    const tokens = sum((r.segments || []).filter((s) => s.kind === "policy").map((s) => s.tokens || 0));
    line(tokens + " tokens, " + (r.finish_reason || "?"));
    const asked = (r.consults || []).length;
    if (asked) line(r.consults.filter(answered).length + " of " + asked + " answered");
    const parts = Object.entries(r.rewards || {});
    if (parts.length > 1) box.title = parts.map(([name, v]) => name + " " + number(v, 3)).join("\n");
    return box;
  };

  const rolloutRow = (r) => {
    const row = el("div", "rollout");
    const body = el("p", "body");
    for (const part of r.segments || []) body.append(segment(part, r.consults || []));
    row.append(facts(r), body);
    return row;
  };
  const groupCard = (group) => {
    const first = group[0];
    const card = el("article", "group");
    const head = el("div", "problem");
    const gold = el("span");
    gold.append("answer ", el("b", "", first.answer ?? "?"), " \u00b7 mean reward ",
      el("b", "", number(sum(group.map((r) => r.reward || 0)) / group.length, 2)));
    head.append(el("pre", "", first.prompt), gold);
    card.append(head, ...group.map(rolloutRow));
    return card;
  };

  const stepKey = (r) => (r.split === "eval" ? "eval " : "") + r.step;
  const fits = (r, want) => {
    const asked = (r.consults || []).length;
    if (want.outcome && outcome(r) !== want.outcome) return false;
    if (want.consults === "asked" && !asked) return false;
    if (want.consults === "accepted" && !(r.consults || []).some(answered)) return false;
    if (want.consults === "none" && asked) return false;
    if (!want.text) return true;
    const text = r.prompt + "\n" + (r.segments || []).map((s) => s.text).join("");
    return text.toLowerCase().includes(want.text);
  };

  let queue = [];
  const showMore = () => {
    list.append(...queue.splice(0, PAGE).map(groupCard));
    more.hidden = queue.length === 0;
  };
  const update = () => {
    const want = Object.fromEntries(new FormData(form));
    want.text = want.text.trim().toLowerCase();
    const hits = rollouts.filter((r) => (!want.step || stepKey(r) === want.step) && fits(r, want));
    const groups = new Map();
    for (const r of hits) {
      const key = stepKey(r) + "/" + (r.group ?? r.prompt_index ?? r.prompt);
      if (!groups.has(key)) groups.set(key, []);
      groups.get(key).push(r);
    }
    queue = [...groups.values()];
    hideTip();
    list.replaceChildren();
    if (hits.length) showMore();
    else { list.append(el("p", "empty", "No rollout fits this filter.")); more.hidden = true; }
    const share = hits.length ? sum(hits.map((r) => outcome(r) === "right")) / hits.length : 0;
    document.getElementById("count").textContent =
      count(hits.length, "rollout") + " in " + count(groups.size, "group") + (hits.length ? ", " + (100 * share).toFixed(0) + " % correct" : "");
    const at = form.step.selectedIndex;
    form.querySelector("[data-move='-1']").disabled = at <= 0;
    form.querySelector("[data-move='1']").disabled = at >= form.step.options.length - 1;
  };

  if (rollouts.length) {
    document.getElementById("rollouts").hidden = false;
    form.step.append(new Option("all steps", ""));
    const keys = [...new Set(rollouts.map(stepKey))];
    for (const key of keys) form.step.append(new Option(key, key));
    form.step.value = keys[0];
    form.addEventListener("input", update);
    form.addEventListener("submit", (event) => event.preventDefault());
    for (const button of form.querySelectorAll("[data-move]"))
      button.addEventListener("click", () => { form.step.selectedIndex += Number(button.dataset.move); update(); });
    more.addEventListener("click", showMore);
    update();
  }

  const SVG = "http://www.w3.org/2000/svg";
  const nearest = (steps, step) =>
    steps.reduce((best, s, i) => (Math.abs(s - step) < Math.abs(steps[best] - step) ? i : best), 0);
  for (const svg of document.querySelectorAll("svg[data-chart]")) {
    const chart = JSON.parse(svg.dataset.chart);
    const [left, right, last] = chart.x;
    const show = (v) => (chart.share ? (100 * v).toFixed(1) + " %" : v.toFixed(3));
    const cross = document.createElementNS(SVG, "path");
    const box = el("div", "readout");
    cross.setAttribute("class", "cross");
    box.hidden = true;
    svg.append(cross);
    svg.parentNode.append(box);
    svg.addEventListener("pointermove", (event) => {
      const spot = svg.getBoundingClientRect();
      const x = ((event.clientX - spot.left) / spot.width) * svg.viewBox.baseVal.width;
      const wanted = ((x - left) / (right - left)) * last;
      const main = chart.lines[0];
      const step = main.steps[nearest(main.steps, wanted)];
      const at = left + ((right - left) * step) / last;
      cross.setAttribute("d", "M" + at + " " + chart.y[0] + "V" + chart.y[1]);
      box.textContent = "step " + step + ": " + chart.lines.map((line) => {
        const i = nearest(line.steps, step);
        const band = line.low.length ? " (" + show(line.low[i]) + " to " + show(line.high[i]) + ")" : "";
        return (line.name ? line.name + " " : "") + show(line.values[i]) + band;
      }).join(", ");
      box.hidden = false;
    });
    svg.addEventListener("pointerleave", () => { box.hidden = true; cross.setAttribute("d", ""); });
  }
})();
