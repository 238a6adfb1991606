// One answer as coloured tokens, a strip of routes and figures; and what is known of one token.

const node = (tag, cls, text) => {
  const made = document.createElement(tag);
  if (cls) made.className = cls;
  if (text !== undefined) made.textContent = text;
  return made;
};
export { node };

const percent = (share) => `${Math.round(100 * share)} %`;

/** Class and letter of each member: its colour, its line, its mark. */
export class Marks {
  constructor(names) {
    this.names = names;
    this.letters = {};
    for (const name of names) {
      const free = [...name.toUpperCase(), ..."ABCDEFGHIJKLMNOPQRSTUVWXYZ"].find(
        (letter) => /[A-Z0-9]/.test(letter) && !Object.values(this.letters).includes(letter));
      this.letters[name] = free ?? "?";
    }
  }
  of(name) {
    const index = this.names.indexOf(name);
    return `e${index < 0 ? 7 : index % 7}`;
  }
}

export const shares = (tokens, names) => {
  const found = {};
  for (const name of names) found[name] = tokens.filter((t) => t.expert === name).length / Math.max(tokens.length, 1);
  return found;
};

export function figures(tokens, seconds) {
  const switches = tokens.slice(1).filter((t, i) => t.expert !== tokens[i].expert).length;
  const overruled = tokens.filter((t) => t.overruled).length;
  const parts = [`${tokens.length} tokens`, `switches ${percent(switches / Math.max(tokens.length - 1, 1))}`,
    `overruled ${percent(overruled / Math.max(tokens.length, 1))}`];
  if (seconds) parts.push(`${(tokens.length / seconds).toFixed(1)} tokens/s`);
  return parts.join("  ·  ");
}

export class AnswerView {
  /** `show(token)` is called for the token that is pointed at or has the focus. */
  constructor(title, marks, show) {
    this.marks = marks;
    this.show = show;
    this.tokens = [];
    this.root = node("article", "answer");
    this.root.append(node("h3", "", title));
    this.text = node("div", "text");
    this.text.setAttribute("aria-label", `Answer of ${title}`);
    this.strip = node("div", "strip");
    this.strip.setAttribute("role", "img");
    this.line = node("p", "figures", "waiting…");
    this.root.append(this.text, this.strip, this.line);
    this.text.addEventListener("pointerover", (event) => this.pick(event.target));
    this.text.addEventListener("focusin", (event) => this.pick(event.target));
    this.text.addEventListener("keydown", (event) => this.walk(event));
  }
  pick(target) {
    const index = target.dataset?.index;
    if (index === undefined) return;
    document.querySelector(".t.chosen")?.classList.remove("chosen");
    target.classList.add("chosen");
    this.show(this.tokens[index]);
  }
  walk(event) {
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 10, ArrowUp: -10 }[event.key];
    const at = Number(event.target.dataset?.index);
    if (!step || Number.isNaN(at)) return;
    event.preventDefault();
    const next = this.text.children[Math.min(Math.max(at + step, 0), this.tokens.length - 1)];
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  }
  add(tokens) {
    for (const token of tokens) {
      const span = node("span", `t ${this.marks.of(token.expert)}`, token.text);
      if (token.overruled) span.classList.add("overruled");
      span.dataset.index = this.tokens.length;
      span.tabIndex = this.tokens.length ? -1 : 0;
      span.setAttribute("aria-label", `${token.text}, ${token.expert}${token.overruled ? ", overruled" : ""}`);
      this.tokens.push(token);
      this.text.append(span);
      this.strip.append(node("span", this.marks.of(token.expert)));
    }
    this.line.textContent = figures(this.tokens, this.seconds?.());
  }
  /** Text that belongs to no token: what was held back for a stop string. */
  tail(text) {
    if (text && this.text.lastChild) this.text.lastChild.textContent += text;
  }
  end(note) {
    const parts = Object.entries(shares(this.tokens, this.marks.names)).map(([name, share]) => `${name} ${percent(share)}`);
    this.strip.setAttribute("aria-label", `Routes over the answer: ${parts.join(", ")}`);
    this.line.textContent = figures(this.tokens, this.seconds?.()) + (note ? `  ·  ${note}` : "");
    this.seconds = undefined;
  }
}

/** What is known of a token, as an element. */
export function describe(token, marks) {
  const box = node("div");
  const head = node("p");
  head.append(node("code", "", JSON.stringify(token.text)), ` by ${token.expert}`, token.drafted ? " (drafted)" : "");
  box.append(head);
  // Where the policy names the expert and the router is left out, there are no scores: the weights are all alike.
  const asked = new Set(Object.values(token.weights)).size > 1;
  if (!asked) {
    box.append(node("p", "", "The policy chose the expert; the router was not asked."));
    if (token.candidates) box.append(table(token, ["fused"]));
    return box;
  }
  for (const [name, weight] of Object.entries(token.weights)) {
    const row = node("div", "weight"), bar = node("div", "bar"), fill = node("span", marks.of(name));
    fill.style.width = `${100 * weight}%`;
    bar.append(fill);
    row.append(node("span", "", name), bar, node("span", "", percent(weight)));
    box.append(row);
  }
  box.append(node("p", "", token.overruled
    ? "The complement overruled the expert: its own first choice was another."
    : "The expert's own first choice stood."));
  if (token.candidates) box.append(table(token, ["router", "expert", "fused"]));
  return box;
}

function table(token, sides) {
  const made = node("table"), head = node("tr");
  for (const side of sides) {
    const cell = node("th", "", side);
    cell.scope = "col";
    head.append(cell);
  }
  made.append(node("caption", "dim", "Likeliest next tokens"), head);
  const rows = Math.max(...sides.map((side) => token.candidates[side].length));
  for (let i = 0; i < rows; i++) {
    const row = node("tr");
    for (const side of sides) {
      const each = token.candidates[side][i], cell = node("td", each?.id === token.id ? "emitted" : "");
      if (each) cell.append(node("code", "", JSON.stringify(each.text)), ` ${percent(Math.exp(each.logprob))}`);
      row.append(cell);
    }
    made.append(row);
  }
  return made;
}
