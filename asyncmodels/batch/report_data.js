"use strict";
// The data of a report, which stays packed until it is looked at, and what an item says, as texts.
const report = (() => {
  const KEPT = 48; // pieces, of some hundred items each
  const names = JSON.parse(document.getElementById("names").textContent);

  const unpacked = (script) => {
    const text = atob(script.textContent), bytes = new Uint8Array(text.length);
    for (let at = 0; at < text.length; at++) bytes[at] = text.charCodeAt(at);
    return new Response(new Response(bytes).body.pipeThrough(new DecompressionStream("gzip")));
  };

  let total = 0;
  const pieces = [...document.querySelectorAll("script.rows")].map((script) => {
    const piece = { script, start: total, count: Number(script.dataset.count) };
    total += piece.count;
    return piece;
  });
  const columns = {};
  const readColumns = async () => {
    const values = new DataView(await unpacked(document.getElementById("columns")).arrayBuffer());
    names.columns.forEach((name, number) => {
      columns[name] = Float32Array.from({ length: total }, (_, row) => values.getFloat32(4 * (number * total + row), true));
    });
  };

  const kept = new Map(); // the pieces that were looked at last

  const pieceOf = (row) => {
    let low = 0, high = pieces.length - 1;
    while (low < high) {
      const middle = (low + high + 1) >> 1;
      if (pieces[middle].start <= row) low = middle; else high = middle - 1;
    }
    return pieces[low];
  };

  const loaded = (piece) => {
    let rows = kept.get(piece);
    if (rows === undefined) {
      rows = unpacked(piece.script).json().then((found) => {
        if (kept.has(piece)) piece.rows = found;
        return found;
      });
      if (kept.size >= KEPT) {
        const [oldest] = kept.keys();
        kept.delete(oldest);
        oldest.rows = undefined;
      }
    }
    kept.delete(piece);
    kept.set(piece, rows);
    return rows;
  };

  const rowNow = (row) => {
    const piece = pieceOf(row);
    return piece.rows && piece.rows[row - piece.start];
  };

  // -- what an item says --------------------------------------------------------------------------------------------

  const image = (part) => {
    const kind = part.media_type || "image", digest = /^\u0000bytes (\w+)/.exec(part.data || "");
    return `[${kind}${digest ? `, sha256 ${digest[1].slice(0, 12)}…` : ""}${part.url ? `, ${part.url}` : ""}]`;
  };
  const partText = (part) =>
    !(part instanceof Object) ? String(part) : part.type === "text" ? String(part.text) : part.type === "image" ? image(part)
      : JSON.stringify(part.value === undefined ? part : part.value);
  const contentText = (content) =>
    content == null ? "" : Array.isArray(content) ? content.map(partText).join("\n") : String(content);
  const callText = (call) => {
    const [name, given] = Array.isArray(call) ? [call[1], call[2]] : [call?.name, call?.arguments];
    return `${name}(${typeof given === "string" ? given : JSON.stringify(given)})`;
  };
  const callTexts = (calls) => (Array.isArray(calls) ? calls.map(callText) : []);
  const messagesOf = (question) =>
    question && Array.isArray(question.messages) ? question.messages.filter((each) => each instanceof Object) : [];
  const messageText = (message) =>
    [message.reasoning, contentText(message.content), ...callTexts(message.tool_calls)].filter(Boolean).join("\n");
  const lastAsked = (question) => {
    const messages = messagesOf(question);
    return messageText(messages.findLast((message) => message.role === "user") || messages.at(-1) || {});
  };
  const answerText = (answer) =>
    answer ? [contentText(answer.content), ...callTexts(answer.tool_calls)].filter(Boolean).join("\n") : "";

  const texts = {
    prompt: ([, question]) => messagesOf(question).map(messageText).join("\n"),
    answer: ([, , answer]) => (answer ? `${answer.reasoning || ""}\n${answerText(answer)}` : ""),
    error: ([, , , error]) => String(error || ""),
    id: ([id]) => id,
  };
  const says = (row, words, place) =>
    place ? texts[place](row).toLowerCase().includes(words)
      : Object.values(texts).some((text) => text(row).toLowerCase().includes(words));

  return {
    names, pieces, columns, total, readColumns, unpacked, pieceOf, loaded, rowNow,
    says, contentText, callTexts, messagesOf, messageText, lastAsked, answerText,
  };
})();
