// The page: a conversation, its controls, and what is kept of it over a reload.

import * as files from "./export.js";
import { chat } from "./stream.js";
import { AnswerView, Marks, describe, node, shares } from "./tokens.js";

const at = (id) => document.getElementById(id);
const KEPT = "fusionroute.turns";
const state = { about: null, marks: null, turns: [], running: null, gone: false, kept: 0, alpha: null };

// ------------------------------------------------------------------------------------------------ conversation

/** The messages so far, as the first answer of each turn has them. */
function messages() {
  // A turn that was refused is none: two questions in a row are more than some chat templates allow.
  return state.turns.filter((turn) => turn.answers[0]?.tokens.length).flatMap((turn) => [
    { role: "user", content: turn.message },
    { role: "assistant", content: turn.answers[0].text },
  ]);
}

function showTurn(turn) {
  const root = node("div", "turn"), answers = node("div", "answers");
  root.append(node("div", "user", turn.message), answers);
  at("turns").append(root);
  return answers;
}

function addAnswer(turn, place, policy) {
  const answer = { title: title(policy), policy, tokens: [], text: "", note: "", ended: false };
  turn.answers.push(answer);
  const view = new AnswerView(answer.title, state.marks, showToken);
  place.append(view.root);
  return { answer, view };
}

const title = (policy) => [...at("policy").options].find((o) => o.value === policy)?.textContent ?? policy;

async function write({ answer, view }, asked, signal) {
  const started = performance.now();
  view.seconds = () => (performance.now() - started) / 1000;
  try {
    const body = {
      model: answer.policy, messages: asked, temperature: Number(at("temperature").value),
      max_completion_tokens: Number(at("tokens").value), candidates: 5,
    };
    if (state.alpha !== null && !/alpha=|expert=router/.test(answer.policy)) body.alpha = state.alpha;
    for await (const chunk of chat(body, at("key").value, signal)) {
      for (const choice of chunk.choices) {
        const tokens = choice.fusionroute?.tokens ?? [], content = choice.delta.content ?? "";
        const end = follow();
        view.add(tokens);
        view.tail(content.slice(tokens.map((t) => t.text).join("").length));
        answer.tokens.push(...tokens);
        answer.text += content;
        if (choice.finish_reason === "length") answer.note = "cut at the length asked for";
        if (end) at("talk").scrollTop = at("talk").scrollHeight;
        if (answer === state.turns.at(-1)?.answers[0]) drawLegend(answer.tokens);
      }
      if (performance.now() - state.kept > 1000) keep();
    }
    if (signal.aborted) answer.note = "stopped";
  } catch (error) {
    answer.note = "broken off";
    problem(error.message);
    if (!(await alive())) waitForServer();
  } finally {
    answer.ended = true;
    view.end(answer.note);
    keep();
  }
}

const follow = () => at("talk").scrollHeight - at("talk").scrollTop - at("talk").clientHeight < 80;

async function ask(event) {
  event?.preventDefault();
  const message = at("message").value.trim();
  if (!message || state.running) return;
  problem("");
  at("message").value = "";
  const turn = { message, answers: [] }, before = messages();
  state.turns.push(turn);
  const place = showTurn(turn), asked = [...before, { role: "user", content: message }];
  at("talk").scrollTop = at("talk").scrollHeight;
  const policies = [at("policy").value, at("compare").value].filter((p, i, all) => p && all.indexOf(p) === i);
  state.running = new AbortController();
  busy(true);
  await Promise.all(policies.map((policy) => write(addAnswer(turn, place, policy), asked, state.running.signal)));
  state.running = null;
  busy(false);
}

function busy(running) {
  at("stop").disabled = !running;
  at("send").disabled = running;
  if (!state.gone) at("status").textContent = running ? "writing…" : "ready";
  for (const id of ["export-json", "export-html"]) at(id).disabled = running || !state.turns.length;
}

// --------------------------------------------------------------------------------------------- beside the answers

function drawLegend(tokens) {
  const share = shares(tokens, state.marks.names), list = at("legend");
  state.about.experts.forEach(({ name, description }, i) => {
    let item = list.children[i];
    if (!item) {
      item = node("li");
      const words = node("div", "", name);
      if (description) words.append(node("span", "about", description));
      const bar = node("div", `bar ${state.marks.of(name)}`);
      bar.append(node("span"));
      words.append(bar);
      item.append(node("span", `swatch ${state.marks.of(name)}`, state.marks.letters[name]), words, node("span", "share"));
      list.append(item);
    }
    item.querySelector(".bar span").style.width = `${100 * share[name]}%`;
    item.querySelector(".share").textContent = `${Math.round(100 * share[name])} %`;
  });
}

function showToken(token) {
  at("token").replaceChildren(describe(token, state.marks));
}

function problem(text) {
  at("problem").hidden = !text;
  at("problem").textContent = text;
}

// ------------------------------------------------------------------------------------------------- kept on reload

function keep() {
  state.kept = performance.now();
  try {
    // Without candidates, which are most of it.
    sessionStorage.setItem(KEPT, JSON.stringify(state.turns, (name, value) => (name === "candidates" ? undefined : value)));
  } catch {
    // Too long a conversation is not kept; it goes on all the same.
  }
}

function restore() {
  let turns = [];
  try {
    turns = JSON.parse(sessionStorage.getItem(KEPT) ?? "[]");
  } catch {
    // What cannot be read was not kept by this page.
  }
  for (const turn of turns) {
    const place = showTurn(turn);
    state.turns.push(turn);
    for (const answer of turn.answers) {
      const view = new AnswerView(answer.title, state.marks, showToken);
      place.append(view.root);
      view.add(answer.tokens);
      view.tail(answer.text.slice(answer.tokens.map((t) => t.text).join("").length));
      if (!answer.ended) answer.note = "broken off by a reload";
      answer.ended = true;
      view.end(answer.note);
    }
  }
  drawLegend(turns.at(-1)?.answers[0]?.tokens ?? []);
}

function clear() {
  state.running?.abort();
  state.turns = [];
  at("turns").replaceChildren();
  at("token").replaceChildren(node("p", "dim", "Point at a token, or focus one and walk with the arrow keys."));
  problem("");
  drawLegend([]);
  keep();
  busy(Boolean(state.running));
}

async function exportPage() {
  const style = await (await fetch("/web/page.css")).text();
  files.save("fusionroute.html", "text/html", files.page(`${state.about.name}: who wrote what`, state.turns, state.marks, style));
}

// -------------------------------------------------------------------------------------------------------- server

async function alive() {
  try {
    return (await fetch("/health/ready", { cache: "no-store" })).ok;
  } catch {
    return false;
  }
}

async function waitForServer() {
  if (state.gone) return;
  state.gone = true;
  at("status").textContent = "the server is gone; waiting for it…";
  while (!(await alive())) await new Promise((done) => setTimeout(done, 1000));
  state.gone = false;
  problem("");
  at("status").textContent = "the server is back, ready";
}

function fillPolicies() {
  const { name, experts, router } = state.about;
  const entries = [
    [name, "fused"], [`${name}@routing=query`, "fused, one decision per prompt"],
    ...experts.map((e) => [`${name}@expert=${e.name},alpha=0`, `${e.name} alone`]),
    ...experts.map((e) => [`${name}@expert=${e.name}`, `${e.name} with the router`]),
    [`${name}@expert=${router}`, "router alone"],
  ];
  for (const id of ["policy", "compare"]) {
    if (id === "compare") at(id).append(new Option("nothing", ""));
    for (const [value, text] of entries) at(id).append(new Option(text, value));
  }
}

async function start() {
  const show = (id) => () => { at(`${id}-value`).textContent = at(id).value; };
  for (const id of ["alpha", "temperature"]) at(id).addEventListener("input", show(id));
  // As long as nobody moves it the collection's own weight stands, which the slider may not be able to show.
  at("alpha").addEventListener("input", () => { state.alpha = Number(at("alpha").value); });
  if (!(await alive())) await waitForServer();
  state.about = await (await fetch("/web/collection.json")).json();
  state.marks = new Marks(state.about.experts.map((e) => e.name));
  at("name").textContent = state.about.name;
  document.title = `${state.about.name} · FusionRoute`;
  at("alpha").value = state.about.alpha;
  at("alpha-value").textContent = state.about.alpha;
  fillPolicies();
  restore();
  busy(false);
  at("ask").addEventListener("submit", ask);
  at("stop").addEventListener("click", () => state.running?.abort());
  at("clear").addEventListener("click", clear);
  at("export-json").addEventListener("click", () =>
    files.save("fusionroute.json", "application/json", JSON.stringify({ collection: state.about, turns: state.turns }, null, 1)));
  at("export-html").addEventListener("click", exportPage);
  window.addEventListener("pagehide", keep);
  at("message").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) ask(event);
  });
}

start();
