// What was said and who wrote it, as a file: JSON, or one HTML page that needs nothing else.

import { figures } from "./tokens.js";

export function save(name, kind, text) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text], { type: kind }));
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

const plain = (text) => text.replace(/[&<>"]/g, (c) => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" })[c]);

/** A whole page; `style` is the page's own stylesheet. */
export function page(name, turns, marks, style) {
  const token = (t) => {
    const weights = Object.entries(t.weights).map(([who, w]) => `${who} ${Math.round(100 * w)} %`).join(", ");
    const title = plain(`${t.expert}${t.overruled ? ", overruled" : ""} (${weights})`);
    return `<span class="t ${marks.of(t.expert)}${t.overruled ? " overruled" : ""}" title="${title}">${plain(t.text)}</span>`;
  };
  const answer = (a) => `<article class="answer"><h3>${plain(a.title)}</h3><div class="text">${a.tokens.map(token).join("")}</div>
<div class="strip">${a.tokens.map((t) => `<span class="${marks.of(t.expert)}"></span>`).join("")}</div>
<p class="figures">${plain(figures(a.tokens))}</p></article>`;
  const turn = (t) => `<div class="turn"><div class="user">${plain(t.message)}</div><div class="answers">${t.answers.map(answer).join("\n")}</div></div>`;
  const legend = marks.names.map((who) => `<li><span class="swatch ${marks.of(who)}">${marks.letters[who]}</span>${plain(who)}</li>`).join("");
  return `<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>${plain(name)}</title><style>${style}
body{display:block;padding:1rem}</style></head>
<body><h1>${plain(name)}</h1><ul id="legend">${legend}</ul>${turns.map(turn).join("\n")}</body></html>
`;
}
