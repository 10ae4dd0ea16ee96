"use strict";
// The table of a report. Only what can be seen is in the document. Texts become text nodes and nothing else, whatever
// they say.
(() => {
  const HEIGHT = 34, BEYOND = 5, SLICE = 8, AHEAD = 3;
  const { names, pieces, columns, total, readColumns, unpacked, pieceOf, loaded, rowNow } = report;
  const { says, contentText, callTexts, messagesOf, messageText, lastAsked, answerText } = report;
  const byId = (id) => document.getElementById(id);
  const [grid, space, query, where, outcome, finish, details, tip] =
    ["grid", "rows", "query", "where", "outcome", "finish", "details", "tip"].map(byId);
  const numbers = new Intl.NumberFormat("en");

  const time = (seconds) =>
    seconds == null || Number.isNaN(seconds) ? "" : seconds < 0.9995 ? `${Number((seconds * 1000).toPrecision(3))} ms`
      : seconds < 99.5 ? `${Number(seconds.toPrecision(3))} s` : `${numbers.format(Math.round(seconds))} s`;
  const count = (value) => (Number.isNaN(value) ? "" : numbers.format(value));
  const errorOf = (row) => names.errors[columns.error[row] - 1];
  const finishOf = (row) => names.finishes[columns.finish[row] - 1];

  const element = (name, style, ...children) => {
    const made = document.createElement(name);
    if (style) made.className = style;
    made.append(...children);
    return made;
  };

  /** `text` as nodes, with what was searched for marked; `most` characters of it, around the first mark. */
  const marked = (text, words, most) => {
    let lower = words && text.toLowerCase();
    if (!lower || lower.length !== text.length || !lower.includes(words)) return [most ? text.slice(0, most) : text];
    if (most) {
      const from = Math.max(0, lower.indexOf(words) - 24);
      text = (from ? "…" : "") + text.slice(from, from + most);
      lower = text.toLowerCase();
    }
    const nodes = [];
    let at = 0;
    for (let next; (next = lower.indexOf(words, at)) >= 0 && nodes.length < 2000; at = next + words.length)
      nodes.push(text.slice(at, next), element("mark", "", text.slice(next, next + words.length)));
    nodes.push(text.slice(at));
    return nodes;
  };

  // -- what is looked for, and in which order ----------------------------------------------------------------------

  let order, view, words = "", active = -1, turn = 0, sortedBy = "place", ascending = true;
  const { port1, port2 } = new MessageChannel();
  const waiting = [];
  port1.onmessage = () => waiting.shift()();
  const pause = () => new Promise((resolve) => { waiting.push(resolve); port2.postMessage(0); });

  const candidates = () => {
    const keep = new Uint8Array(total), ended = Number(finish.value), kinds = columns.error, ends = columns.finish;
    const chosen = outcome.value, one = Number(chosen), all = chosen === "", good = chosen === "ok", bad = chosen === "bad";
    for (let row = 0; row < total; row++) {
      const kind = kinds[row];
      const wanted = all || (good ? kind === 0 : bad ? kind !== 0 : kind === one);
      keep[row] = wanted && (!ended || ends[row] === ended) ? 1 : 0;
    }
    return keep;
  };

  const show = (keep, searched) => {
    const chosen = active >= 0 && view ? view[active] : -1;
    let many = 0;
    view = new Uint32Array(total);
    for (const row of order) if (keep[row]) view[many++] = row;
    view = view.subarray(0, many);
    active = chosen < 0 ? -1 : view.indexOf(chosen);
    const found = view.length === total ? `${numbers.format(total)} items` : `${numbers.format(view.length)} of ${numbers.format(total)} items`;
    byId("found").textContent = searched < 1 ? `${found}, searching… ${Math.floor(100 * searched)} %` : found;
    byId("empty").hidden = view.length > 0 || searched < 1;
    grid.setAttribute("aria-rowcount", view.length + 1);
    grid.setAttribute("aria-busy", searched < 1);
    space.style.height = `${view.length * HEIGHT}px`;
    draw();
  };

  /** Looks through all pieces, a few milliseconds at a time; what is typed meanwhile ends it. */
  const update = async () => {
    const mine = ++turn, keep = candidates();
    words = query.value.trim().toLowerCase();
    if (!words) return show(keep, 1);
    const looked = words, place = where.value, found = new Uint8Array(total);
    const wanted = pieces.filter((piece) => keep.subarray(piece.start, piece.start + piece.count).includes(1));
    const coming = new Map();
    const ahead = (piece) => {
      const from = wanted.indexOf(piece);
      for (const next of wanted.slice(from, from + AHEAD)) {
        if (!next.rows && !coming.has(next)) coming.set(next, unpacked(next.script).json());
      }
      const rows = coming.get(piece);
      coming.delete(piece);
      return rows;
    };
    let since = performance.now(), shown = since;
    show(found, 0);
    for (const piece of wanted) {
      const rows = piece.rows || (await ahead(piece));
      for (let at = 0; at < piece.count; at++) {
        if (performance.now() - since > SLICE) {
          await pause();
          since = performance.now();
        }
        if (mine !== turn) return;
        const row = piece.start + at;
        if (keep[row] && says(rows[at], looked, place)) found[row] = 1;
      }
      if (performance.now() - shown > 150) {
        show(found, (piece.start + piece.count) / total);
        shown = performance.now();
      }
    }
    show(found, 1);
  };

  const sort = (by) => {
    ascending = by === sortedBy ? !ascending : by === "place" || by === "error";
    sortedBy = by;
    // Floats of at least 0 are ordered as their bits are, and what is not known comes last. With the row below those
    // bits they are whole numbers, which are sorted without asking us about each two of them.
    const bits = new Uint32Array(columns[by].buffer), infinity = 0x7f800000, rows = 2 ** 20;
    const packed = new Float64Array(total);
    for (let row = 0; row < total; row++) {
      const bit = bits[row];
      packed[row] = (ascending || bit > infinity ? bit : infinity - bit) * rows + row;
    }
    packed.sort();
    order = new Uint32Array(total);
    for (let at = 0; at < total; at++) order[at] = packed[at] % rows;
    for (const button of grid.querySelectorAll("[data-sort]")) {
      const now = button.dataset.sort === by ? (ascending ? "ascending" : "descending") : "none";
      button.parentElement.setAttribute("aria-sort", now);
    }
  };

  // -- the rows that can be seen -----------------------------------------------------------------------------------

  const drawn = new Map(); // by their place in the view

  const fresh = () => {
    const made = element("div", "row");
    made.setAttribute("role", "row");
    for (const style of ["number dim", "", "", "", "", "number", "number", "number", "number"]) {
      const cell = element("div", style);
      cell.setAttribute("role", "gridcell");
      made.append(cell);
    }
    return made;
  };

  const fill = (line, at) => {
    const row = view[at], data = rowNow(row), error = errorOf(row), now = `${at} ${row} ${at === active} ${words}`;
    if (line.now === now && line.filled) return;
    line.now = now;
    line.id = `row-${at}`;
    line.setAttribute("aria-rowindex", at + 2);
    line.setAttribute("aria-selected", at === active);
    line.classList.toggle("active", at === active);
    line.style.order = at; // in print, where rows stand one after the other
    line.style.transform = `translateY(${at * HEIGHT}px)`;
    line.filled = data !== undefined;
    const cells = line.children, pill = element("span", error ? "pill bad" : "pill good", error || finishOf(row) || "answered");
    pill.title = pill.textContent;
    cells[0].textContent = count(columns.place[row]);
    cells[1].replaceChildren(...(data ? marked(data[0], words, 100) : ["…"]));
    cells[2].replaceChildren(pill);
    const shorter = (text) => marked(text.replace(/\s+/g, " "), words, 180);
    cells[3].replaceChildren(...(data ? shorter(prompted(data)) : ["…"]));
    cells[4].replaceChildren(...(data ? shorter(answerText(data[2]) || data[3] || "") : ["…"]));
    cells[4].classList.toggle("dim", Boolean(error));
    cells[5].textContent = time(columns.seconds[row]);
    cells[6].textContent = count(columns.input[row]);
    cells[7].textContent = count(columns.output[row]);
    cells[8].textContent = count(columns.attempts[row]);
  };

  /** What was asked last, or whatever of the conversation has what is searched for. */
  const prompted = (data) => {
    const last = lastAsked(data[1]).slice(0, 20000);
    if (!words || last.toLowerCase().includes(words)) return last;
    const other = messagesOf(data[1]).map(messageText).find((text) => text.toLowerCase().includes(words));
    return other === undefined ? last : other;
  };

  const draw = () => {
    if (!view) return;
    const first = Math.max(0, Math.floor(grid.scrollTop / HEIGHT) - BEYOND);
    const last = Math.min(view.length, Math.ceil((grid.scrollTop + grid.clientHeight) / HEIGHT) + BEYOND);
    const spare = [...drawn].filter(([at]) => at < first || at >= last);
    for (const [at] of spare) drawn.delete(at);
    const missing = new Set();
    for (let at = first; at < last; at++) {
      let line = drawn.get(at);
      if (!line) {
        line = spare.length ? spare.pop()[1] : space.appendChild(fresh());
        drawn.set(at, line);
      }
      if (rowNow(view[at]) === undefined) missing.add(pieceOf(view[at]));
      fill(line, at);
    }
    for (const [, line] of spare) line.remove();
    if (missing.size) Promise.all([...missing].map(loaded)).then(later);
  };

  let asked = false;
  const later = () => {
    if (asked) return;
    asked = true;
    requestAnimationFrame(() => { asked = false; draw(); });
  };

  // -- one item ----------------------------------------------------------------------------------------------------

  const said = (title, style, ...bodies) =>
    element("section", `said ${style}`, element("h3", "", title), ...bodies.map((text) => element("pre", "", ...marked(text, words))));

  const told = (row, more) => {
    const list = element("dl", "told");
    const began = more.began ? new Date(more.began * 1000).toISOString().replace("T", " ").slice(0, 23) : "";
    for (const [name, value] of [
      ["Time, all together", time(columns.seconds[row])], ["Waiting before", time(more.queued)],
      ["First token after", time(more.first)], ["By the model", time(more.service)],
      ["Tokens in", count(columns.input[row])], ["of them cached", more.cached_tokens], ["Tokens out", count(columns.output[row])],
      ["of them reasoning", more.reasoning_tokens], ["Attempts", count(columns.attempts[row])], ["Ended by", finishOf(row)],
      ["HTTP status", more.status], ["Began (UTC)", began], ["Model", more.model], ["Agent", more.agent],
      ["From the cache", more.cached ? "yes" : ""],
    ]) {
      if (value == null || value === "") continue;
      list.append(element("div", "", element("dt", "", name), element("dd", "", String(value))));
    }
    return list;
  };

  const open = async (at) => {
    if (at < 0 || at >= view.length) return;
    active = at;
    draw();
    const row = view[at], piece = pieceOf(row), data = (await loaded(piece))[row - piece.start];
    if (row !== view[active]) return;
    const [id, question, answer, error, more] = data, body = element("div", "body", told(row, more));
    for (const message of messagesOf(question)) {
      const calls = callTexts(message.tool_calls);
      const title = [message.role, message.name, message.tool_call_id].filter(Boolean).join(" · ");
      const bodies = [message.reasoning && `(thought) ${message.reasoning}`, contentText(message.content), ...calls].map((text) => text && String(text));
      body.append(said(title, "", ...bodies.filter(Boolean)));
    }
    const { messages, ...others } = question || {};
    if (Object.keys(others).length) body.append(said("asked with", "", JSON.stringify(others, null, 2)));
    if (answer && answer.reasoning) body.append(said("thought", "", String(answer.reasoning)));
    if (answer) body.append(said("answer", "good", contentText(answer.content) || "(no text)", ...callTexts(answer.tool_calls)));
    if (errorOf(row)) body.append(said(errorOf(row), "bad", String(error || "(no message)")));
    const button = (text, label, off, does) => {
      const made = element("button", "", text);
      made.type = "button";
      made.disabled = off;
      made.setAttribute("aria-label", label);
      made.addEventListener("click", does);
      return made;
    };
    details.replaceChildren(
      element("div", "top", element("h2", "", id),
        button("‹", "The one before", at === 0, () => open(active - 1)),
        button("›", "The next one", at === view.length - 1, () => open(active + 1)),
        button("Close", "Close", false, () => details.close())),
      body,
    );
    body.tabIndex = 0;
    if (!details.open) details.showModal();
    body.focus();
  };

  const select = (at) => {
    active = Math.max(0, Math.min(view.length - 1, at));
    const top = active * HEIGHT, head = 32;
    if (top < grid.scrollTop) grid.scrollTop = top;
    else if (top + HEIGHT + head > grid.scrollTop + grid.clientHeight) grid.scrollTop = top + HEIGHT + head - grid.clientHeight;
    draw();
    grid.setAttribute("aria-activedescendant", `row-${active}`);
  };

  // -- what people do ----------------------------------------------------------------------------------------------

  const options = (list, all, counts, offered) => {
    list.append(new Option(all, ""));
    for (const [value, name] of offered) {
      const many = counts(value);
      if (many) list.append(new Option(`${name} (${numbers.format(many)})`, value));
    }
    list.hidden = list.length < 2;
  };

  const listen = () => {
    grid.addEventListener("scroll", later, { passive: true });
    new ResizeObserver(later).observe(grid);
    for (const list of [where, outcome, finish]) list.addEventListener("change", update);
    query.addEventListener("input", update);
    query.form.addEventListener("submit", (event) => event.preventDefault());
    grid.addEventListener("click", (event) => {
      const by = event.target.closest("[data-sort]");
      if (by) {
        sort(by.dataset.sort);
        grid.scrollTop = 0;
        return update();
      }
      const line = event.target.closest(".row");
      return line && open(Number(line.id.slice(4)));
    });
    grid.addEventListener("keydown", (event) => {
      if (event.target !== grid || event.altKey || event.ctrlKey || event.metaKey) return;
      const page = Math.max(1, Math.floor(grid.clientHeight / HEIGHT) - 2);
      const to = { ArrowDown: active + 1, ArrowUp: active - 1, PageDown: active + page, PageUp: active - page, Home: 0, End: view.length - 1 }[event.key];
      if (to === undefined && !(event.key === "Enter" && active >= 0)) return;
      event.preventDefault();
      if (event.key === "Enter") open(active);
      else if (view.length) select(to);
    });
    details.addEventListener("keydown", (event) => {
      if (event.key === "ArrowLeft") open(active - 1);
      else if (event.key === "ArrowRight") open(active + 1);
    });
    details.addEventListener("close", () => { if (active >= 0) select(active); grid.focus(); });
    document.addEventListener("keydown", (event) => {
      if (event.key !== "/" || event.target.matches("input, select") || details.open) return;
      event.preventDefault();
      query.focus();
    });
    document.querySelector("main").addEventListener("click", (event) => {
      const { error, place } = event.target.dataset;
      if (error !== undefined) {
        const known = names.errors.indexOf(error) + 1;
        [outcome.value, query.value, finish.value] = [known ? String(known) : "bad", "", ""];
        update();
        byId("table").scrollIntoView();
      } else if (place !== undefined) {
        [outcome.value, query.value, finish.value] = ["", "", ""];
        update();
        const at = view.findIndex((row) => columns.place[row] === Number(place));
        if (at >= 0) select(at), open(at);
      }
    });
  };

  const tell = () => {
    for (const hit of document.querySelectorAll(".hit")) {
      hit.told = hit.textContent;
      hit.replaceChildren();
    }
    const hide = () => { tip.style.display = "none"; };
    document.addEventListener("pointermove", ({ target, clientX, clientY }) => {
      if (!target.told) return hide();
      tip.textContent = target.told;
      tip.style.display = "block";
      const left = clientX + 14 + tip.offsetWidth > innerWidth ? clientX - 14 - tip.offsetWidth : clientX + 14;
      tip.style.transform = `translate(${left}px, ${clientY + 14}px)`;
    });
    document.addEventListener("scroll", hide, { passive: true, capture: true });
  };

  const begin = async () => {
    tell();
    if (typeof DecompressionStream === "undefined") {
      byId("found").textContent = "This browser is too old to unpack the table.";
      return;
    }
    await readColumns();
    const tally = (column) => {
      const counts = new Map();
      for (const value of column) counts.set(value, (counts.get(value) || 0) + 1);
      return counts;
    };
    const errors = tally(columns.error), finishes = tally(columns.finish), failed = total - (errors.get(0) || 0);
    options(outcome, "all outcomes", (value) => (value === "ok" ? total - failed : value === "bad" ? failed : errors.get(value)),
      [["ok", "answered"], ["bad", "failed"], ...names.errors.map((name, number) => [number + 1, name])]);
    options(finish, "any ending", (value) => finishes.get(value), names.finishes.map((name, number) => [number + 1, name]));
    sortedBy = "";
    sort("place");
    const shown = new Set(columns.place);
    for (const button of document.querySelectorAll("[data-place]")) button.disabled = !shown.has(Number(button.dataset.place));
    listen();
    await update();
  };
  begin();
})();
