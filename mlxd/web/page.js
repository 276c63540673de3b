// The page: reads /ui/feed for as long as it is open, shows what it says, and sends what the buttons ask for.
// Whatever comes from outside (names, logs, last words, answers) becomes text, never markup. Nodes are kept and changed in place, so that
// nothing moves under a finger and nothing loses the focus.

const FEED_SILENT_MS = 8000; // the feed speaks each second
const WINDOW_S = 600;
const WIDTH = 600, HEIGHT = 72; // of a chart, in its own units

const $ = (id) => document.getElementById(id);
const sleep = (ms) => new Promise((done) => setTimeout(done, ms));

let now = null; // the newest word of the feed
let samples = []; // oldest first
let answer = null; // the one that is being written

// --- nodes -----------------------------------------------------------------------------------------------------------------------

function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function svg(tag, attributes = {}) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  set(node, attributes);
  return node;
}

function set(node, attributes) {
  for (const [name, value] of Object.entries(attributes)) {
    if (node.getAttribute(name) !== String(value)) node.setAttribute(name, value);
  }
}

function say(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

/** One child for each item, in their order: a key that was there keeps its node. */
function keep(parent, items, keyOf, make, update) {
  const keys = new Set(items.map((item, index) => String(keyOf(item, index))));
  const there = new Map();
  for (const node of [...parent.children]) {
    if (keys.has(node.dataset.key)) there.set(node.dataset.key, node);
    else node.remove();
  }
  let place = parent.firstElementChild;
  for (const [index, item] of items.entries()) {
    const key = String(keyOf(item, index));
    const node = there.get(key) ?? make(item);
    node.dataset.key = key;
    if (node === place) place = place.nextElementSibling;
    else parent.insertBefore(node, place);
    update(node, item);
  }
}

/** What was done, and what happened elsewhere: read aloud, and gone after a while. `aloud`: what eyes see anyway. */
function announce(text, aloud = false) {
  $("said").classList.toggle("unseen", aloud);
  say($("said"), text);
  clearTimeout(announce.timer);
  announce.timer = setTimeout(() => say($("said"), ""), 15000);
}

// --- words -----------------------------------------------------------------------------------------------------------------------

const size = (count) => (count >= 1e9 ? `${(count / 1e9).toFixed(1)} GB` : `${Math.round(count / 1e6)} MB`);
const short = (name) => name.replace(/:latest$/, "");
const clock = (when) => new Date(when).toLocaleTimeString("en-GB");
const joined = (...parts) => parts.filter(Boolean).join(" · ");
const capital = (text) => text[0].toUpperCase() + text.slice(1);
const many = (count, one, more = `${one}s`) => `${count} ${count === 1 ? one : more}`;
const span = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : ms < 60000 ? `${(ms / 1000).toFixed(1)} s` : age(ms / 1000));

/** 3h12m, 4m07s, 12s: as `mlxd status` says it. */
function age(seconds) {
  const s = Math.max(0, Math.floor(seconds));
  const two = (n) => String(n).padStart(2, "0");
  if (s >= 86400) return `${Math.floor(s / 86400)}d${two(Math.floor((s % 86400) / 3600))}h`;
  if (s >= 3600) return `${Math.floor(s / 3600)}h${two(Math.floor((s % 3600) / 60))}m`;
  return s >= 60 ? `${Math.floor(s / 60)}m${two(s % 60)}s` : `${s}s`;
}

// --- asking ----------------------------------------------------------------------------------------------------------------------

/** A "no" in a sentence. `status` 0: nobody answered. */
class Trouble extends Error {
  constructor(status, sentence) {
    super(sentence);
    this.status = status;
  }
}

const token = () => sessionStorage.getItem("mlxd.token");

/** The response, if it is a yes. Raises Trouble. */
async function ask(path, { body, signal } = {}) {
  const headers = {};
  if (body) headers["content-type"] = "application/json";
  if (token()) headers.authorization = `Bearer ${token()}`;
  const asked = { method: body ? "POST" : "GET", headers, signal, cache: "no-store", body: body && JSON.stringify(body) };
  const response = await fetch(path, asked).catch((error) => {
    throw error.name === "AbortError" ? error : new Trouble(0, `nobody answers at ${location.host}; \`mlxd start\` starts mlxd`);
  });
  if (response.ok) return response;
  const said = await response.json().catch(() => ({}));
  throw new Trouble(response.status, said.error?.message ?? said.error ?? `the server answered with status ${response.status}`);
}

/** Why something failed, for people. */
const sentence = (error) => (error instanceof Trouble ? error.message : "this page does not understand the answer: reload it");

const BROKEN = new Trouble(0, "the connection broke");

/** The lines of a stream that end with `end`, as they come. Raises Trouble. */
async function* pieces(response, end) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : BROKEN;
    });
    if (done) return;
    const found = (rest + value).split(end);
    rest = found.pop();
    yield* found;
  }
}

/** Server-sent events: {name, data, comment}. */
async function* events(response) {
  for await (const block of pieces(response, "\n\n")) {
    const event = { name: "message", data: "", comment: "" };
    for (const line of block.split("\n")) {
      if (line.startsWith(":")) event.comment = line.slice(1).trim();
      else if (line.startsWith("event:")) event.name = line.slice(6).trim();
      else if (line.startsWith("data:")) event.data += line.slice(5).trim();
    }
    yield event;
  }
}

// --- the feed --------------------------------------------------------------------------------------------------------------------

async function follow() {
  let pause_ms = 500;
  for (;;) {
    await visible();
    try {
      for await (const event of spoken()) {
        hear(event);
        pause_ms = 500;
      }
      throw BROKEN;
    } catch (error) {
      if (document.hidden) continue;
      if (error.status === 401 || (error.status === 403 && token())) {
        await newToken(error);
        pause_ms = 500;
        continue;
      }
      if (error.name === "AbortError") away(`The server has said nothing for ${FEED_SILENT_MS / 1000} s; trying again.`);
      else if (error === BROKEN) away("The server is being replaced; trying again.");
      else away(`${capital(sentence(error))}. Trying again.`);
      if (!(error instanceof Trouble) && error.name !== "AbortError") console.error(error);
    }
    await sleep(pause_ms);
    pause_ms = Math.min(2 * pause_ms, 5000);
  }
}

/** Nobody looks at a hidden tab, and it would hold one of the six connections that a browser has for a server. */
const visible = () => document.hidden && new Promise((done) => document.addEventListener("visibilitychange", done, { once: true }));

/** The feed's events; raises AbortError when it falls silent, and when the page is hidden. */
async function* spoken() {
  const silence = new AbortController();
  document.addEventListener("visibilitychange", () => silence.abort(), { signal: silence.signal });
  let timer = setTimeout(() => silence.abort(), FEED_SILENT_MS);
  try {
    for await (const event of events(await ask("/ui/feed", { signal: silence.signal }))) {
      clearTimeout(timer);
      timer = setTimeout(() => silence.abort(), FEED_SILENT_MS);
      yield event;
    }
  } finally {
    clearTimeout(timer);
    silence.abort();
  }
}

function hear(event) {
  if (event.name === "history") remember(JSON.parse(event.data).samples);
  if (event.name !== "now") return;
  now = JSON.parse(event.data);
  if (now.sample) remember([now.sample]);
  $("panels").hidden = false;
  $("forget").hidden = !token();
  showState();
  showFigures();
  showProcesses();
  showIncidents();
  showRequests();
  showModels();
  showPulls();
  answer?.look(now.requests);
}

/** A new server's history begins with it; what an earlier one told stays. */
function remember(more) {
  if (!more.length) return;
  samples = [...samples.filter((one) => one.at < more[0].at), ...more];
  samples = samples.filter((one) => one.at > samples.at(-1).at - WINDOW_S);
}

function away(text) {
  showHead("No answer", "bad", text);
}

// --- the token -------------------------------------------------------------------------------------------------------------------

/** Ask for a token until there is another one. */
function newToken(error) {
  const had = token();
  sessionStorage.removeItem("mlxd.token");
  $("panels").hidden = true;
  $("forget").hidden = true;
  $("token-form").hidden = false;
  showHead("A token is needed", "quiet", "This server tells only holders of an admin’s token how it is.");
  const why = error.status === 403 ? "This token is for inference; the page needs an admin’s." : "The server does not know this token.";
  say($("token-error"), had ? why : "");
  $("token").value = "";
  $("token").focus();
  return new Promise((done) => {
    $("token-form").onsubmit = (event) => {
      event.preventDefault();
      const given = $("token").value.trim();
      if (!/^[!-~]+$/.test(given)) return say($("token-error"), "A token has letters, digits and signs, and no blank.");
      sessionStorage.setItem("mlxd.token", given);
      $("token").value = "";
      $("token-form").hidden = true;
      done();
    };
  });
}

function forgetToken() {
  sessionStorage.removeItem("mlxd.token");
  location.reload();
}

// --- how it is -------------------------------------------------------------------------------------------------------------------

const STATES = {
  ready: ["Ready", "good"],
  ok: ["Ready", "good"],
  degraded: ["Degraded", "warn"],
  starting: ["Starting", "quiet"],
  loading: ["Starting", "quiet"],
  draining: ["Stopping", "quiet"],
  cooldown: ["Waiting to try again", "bad"],
  held: ["Held", "bad"],
};
const PROCESS_STATES = { blank: "spare", backoff: "waiting", cooldown: "waiting" };

function showHead(word, tone, reason, notes = []) {
  if ($("state").textContent !== word && now) announce(word === "No answer" ? reason : `mlxd: ${word.toLowerCase()}`, true);
  say($("state"), word);
  set($("state"), { "data-tone": tone });
  say($("reason"), reason);
  keep($("notes"), notes, (note) => note, () => el("li"), say);
  document.title = `${word} · mlxd`;
}

function showState() {
  const { status } = now;
  const [word, tone] = STATES[status?.state ?? now.word] ?? [status.state, "warn"];
  const reason = status ? status.reason : now.reason;
  const notes = [...(status?.notes ?? ["The supervisor does not answer; the server goes on without it. `mlxd recover` wakes or replaces it."])];
  showState.version ??= now.version;
  if (showState.version !== now.version) notes.push("mlxd was upgraded meanwhile: reload this page.");
  showHead(word, status ? tone : "warn", reason ? `${capital(reason)}.` : lastTrouble(), notes);
  say($("version"), now.version);
  say($("url"), (status?.url ?? location.origin).replace(/^http:\/\//, ""));
}

/** The last trouble since mlxd started, and what was done about it; for whoever looks once. */
function lastTrouble() {
  const up_s = now.status?.supervisor.up_s;
  if (up_s === undefined) return "Requests are served.";
  const [last] = incidents();
  const ago_s = last ? now.at - Date.parse(last.ts) / 1000 : Infinity;
  if (ago_s > up_s) return `Nothing has gone wrong since it started ${age(up_s)} ago.`;
  const resumed = now.resumed ? `, and ${many(now.resumed, "answer")} went on in another engine` : "";
  return `${age(ago_s)} ago ${title(last).replace("The", "the")} ${last.remedy}. It was replaced${resumed}.`;
}

/** What was not meant to end. */
const incidents = () => now.incidents.filter((one) => one.cause !== "stopped");
const title = (end) => (end.child === "server" ? "The server" : `${end.child}-${end.slot}`);

function showFigures() {
  const last = samples.at(-1) ?? { tokens_s: 0, engines_bytes: 0, available_bytes: 0 };
  const speed = (count) => (count < 10 && count > 0 ? count.toFixed(1) : Math.round(count).toLocaleString("en"));
  const fastest = Math.max(0, ...samples.map((one) => one.tokens_s));
  const largest = Math.max(0, ...samples.map((one) => one.engines_bytes));
  say($("speed"), speed(last.tokens_s));
  say($("speed-most"), fastest ? `at most ${speed(fastest)}` : "");
  draw($("speed-chart"), (one) => one.tokens_s, fastest);
  set($("speed-chart"), { "aria-label": `Tokens a second over ten minutes: now ${speed(last.tokens_s)}, at most ${speed(fastest)}` });
  say($("memory"), size(last.engines_bytes));
  say($("memory-free"), `${size(last.available_bytes)} free`);
  draw($("memory-chart"), (one) => one.engines_bytes, largest);
  set($("memory-chart"), { "aria-label": `Memory of the models over ten minutes: now ${size(last.engines_bytes)}, at most ${size(largest)}` });
  say($("running"), `${now.queue.running} of ${now.queue.slots}`);
  say($("waiting"), String(now.queue.waiting));
  say($("resumed"), String(now.resumed));
}

/** A line and its shade, ten minutes wide, the newest sample at the right; a gap where no server sampled. */
function draw(chart, value, most) {
  if (!chart.firstChild) chart.append(svg("path", { class: "shade" }), svg("path", { class: "line" }));
  const end = samples.at(-1)?.at ?? 0;
  const x = (one) => (WIDTH - ((end - one.at) * WIDTH) / WINDOW_S).toFixed(1);
  const y = (one) => (HEIGHT - 2 - ((HEIGHT - 6) * value(one)) / (most || 1)).toFixed(1);
  const runs = [];
  for (const [index, one] of samples.entries()) {
    if (!index || one.at - samples[index - 1].at > 10) runs.push([]);
    runs.at(-1).push(one);
  }
  const lines = runs.map((run) => run.map((one) => `${x(one)} ${y(one)}`).join("L"));
  set(chart.firstChild, { d: runs.map((run, n) => `M${x(run[0])} ${HEIGHT}L${lines[n]}L${x(run.at(-1))} ${HEIGHT}Z`).join("") });
  set(chart.lastChild, { d: lines.map((line) => `M${line}`).join("") });
}

// --- the processes, and how they ended -------------------------------------------------------------------------------------------

function showProcesses() {
  const { status } = now;
  const found = [];
  if (status) {
    found.push({ name: "supervisor", state: "running", ...status.supervisor });
    if (status.server) found.push({ name: "server", ...status.server });
    for (const one of status.engines) found.push({ name: `engine-${one.slot}`, more: one.model ? short(one.model) : "no model yet", ...one });
    for (const one of status.pullers ?? []) found.push({ name: `puller-${one.slot}`, more: one.model, ...one });
  }
  keep($("process-rows"), found, (one) => one.name, processRow, showProcess);
}

const processRow = () => el("tr", {}, el("th", { scope: "row" }, el("span"), el("small")), el("td"), el("td"), el("td"));

function showProcess(row, one) {
  const [name, state, up, memory] = row.cells;
  set(row, { class: one.name === "supervisor" ? "root" : "child", "data-tone": /^(backoff|cooldown|held)$/.test(one.state) ? "bad" : "good" });
  say(name.firstChild, one.name);
  const restarts = one.restarts ? many(one.restarts, "restart") : "";
  const work = one.running ? many(one.running, "request") : "";
  say(name.lastChild, joined(one.pid ? `pid ${one.pid}` : "no process", one.more, restarts, work));
  say(state, PROCESS_STATES[one.state] ?? one.state);
  say(up, one.pid ? age(one.up_s) : "");
  say(memory, size(one.memory_bytes));
}

function showIncidents() {
  const found = incidents();
  $("incidents-empty").hidden = found.length > 0;
  keep($("incidents"), found, (one) => `${one.ts} ${one.pid}`, incidentItem, () => {});
}

function incidentItem(one) {
  const item = el("li", {}, el("p", {}, el("strong", {}, title(one)), ` ${one.remedy || `ended: ${one.cause}`}`), el("small", {}, facts(one)));
  const words = () => el("pre", { tabindex: 0, role: "group", "aria-label": "Last words" }, one.text);
  if (one.text) item.append(el("details", {}, el("summary", {}, "Last words"), words()));
  return item;
}

function facts(one) {
  const how = one.signal !== null ? `signal ${one.signal}` : one.code !== null ? `status ${one.code}` : "";
  const met = one.running ? `${many(one.running, "request")} on it` : "";
  return joined(clock(one.ts), one.model && short(one.model), one.cause, how, `pid ${one.pid}`, `after ${age(one.up_s)}`, met);
}

// --- requests --------------------------------------------------------------------------------------------------------------------

const PHASES = { queued: "queued", loading: "loading the model", prefill: "reading the prompt", decode: "answering", lost: "the engine died" };

function showRequests() {
  const found = [...now.requests].reverse().concat(now.recent);
  $("requests-empty").hidden = found.length > 0;
  $("requests-table").hidden = found.length === 0;
  keep($("request-rows"), found, (one) => `${one.id} ${one.at}`, requestRow, showRequest);
}

function requestRow() {
  const way = svg("svg", { viewBox: "0 0 100 1", preserveAspectRatio: "none", role: "img", class: "way" });
  return el("tr", {}, el("th", { scope: "row" }, el("span"), el("small")), el("td", {}, way, el("small")), el("td"));
}

function showRequest(row, one) {
  const [what, way, end] = row.cells;
  const total = one.outcome ? one.phases.at(-1)?.[1] ?? 0 : Math.max(0, (now.at - one.at) * 1000);
  const parts = one.phases.map(([word, from], n) => ({ word, from, to: one.phases[n + 1]?.[1] ?? total })).filter((part) => part.word !== "ended");
  say(what.firstChild, one.path);
  say(what.lastChild, joined(one.model && short(one.model), clock(one.at * 1000)));
  keep(way.firstChild, parts, (_, n) => n, () => svg("rect", { height: 1 }), (bar, part) => {
    const width = Math.max(1, (100 * (part.to - part.from)) / (total || 1));
    set(bar, { class: part.word, x: Math.min(99, (100 * part.from) / (total || 1)), width });
  });
  set(way.firstChild, { "aria-label": parts.map((part) => `${part.word} ${span(part.to - part.from)}`).join(", ") || "nothing yet" });
  const resumed = one.resumes ? `went on ${one.resumes === 1 ? "in another engine" : `${one.resumes} times`}` : "";
  const told = one.completion_tokens ? `${one.prompt_tokens} + ${one.completion_tokens} tokens` : "";
  const phase = one.outcome ? "" : PHASES[parts.at(-1)?.word] ?? "";
  say(way.lastChild, joined(span(total), phase, told, resumed));
  say(end, one.outcome ? `${one.outcome}${one.outcome === "done" ? "" : ` ${one.status || ""}`}` : "in hand");
  set(end, { "data-tone": one.outcome === "failed" ? "bad" : one.outcome === "refused" ? "warn" : "good" });
}

// --- models ----------------------------------------------------------------------------------------------------------------------

const MODEL_STATES = { absent: "on disk", loading: "loading", ready: "ready", retried: "being tried again", releasing: "leaving" };
const busy = new Map(); // name -> what is being done with it

function showModels() {
  $("models-empty").hidden = now.models.length > 0;
  keep($("model-rows"), now.models, (one) => one.name, modelRow, showModel);
  const wanted = now.models.find((one) => one.state === "ready" && !one.alias_of) ?? now.models[0];
  const chosen = $("model").value || wanted?.name;
  keep($("model"), now.models, (one) => one.name, (one) => el("option", { value: one.name }), (option, one) => say(option, short(one.name)));
  if ($("model").value !== chosen && now.models.some((one) => one.name === chosen)) $("model").value = chosen;
}

function modelRow(one) {
  const button = el("button", { type: "button", class: "plain" });
  button.onclick = () => toggle(one.name);
  return el("tr", {}, el("th", { scope: "row" }, el("span"), el("small")), el("td", {}, el("span"), el("small")), el("td", {}, button));
}

function showModel(row, one) {
  const [name, state, action] = row.cells;
  const kind = one.alias_of ? `another name of ${short(one.alias_of)}` : size(one.size_bytes);
  say(name.firstChild, short(one.name));
  say(name.lastChild, joined(kind, one.builtin && !one.alias_of && "built in: a demo", one.pinned && "pinned"));
  say(state.firstChild, MODEL_STATES[one.state] ?? one.state);
  const loaded = one.state === "ready";
  const stays = one.running ? `answering ${one.running}` : one.leaves_s === null ? "stays" : `leaves in ${age(one.leaves_s)}`;
  say(state.lastChild, joined(one.memory_bytes ? size(one.memory_bytes) : "", loaded ? stays : ""));
  const verb = one.state === "absent" ? "Load" : "Unload";
  say(action.firstChild, busy.get(one.name) ?? verb);
  set(action.firstChild, { "aria-label": `${busy.get(one.name) ?? verb} ${short(one.name)}` });
}

/** Load what is not loaded, else unload it. */
async function toggle(name) {
  const loading = now.models.find((one) => one.name === name)?.state === "absent";
  if (busy.has(name)) return;
  busy.set(name, loading ? "Loading…" : "Unloading…");
  showModels();
  try {
    await (await ask("/api/generate", { body: { model: name, stream: false, ...(loading ? {} : { keep_alive: 0 }) } })).json();
    const used = now.models.find((one) => one.name === name)?.running;
    const gone = used ? "is in use; it is unloaded when its requests have ended" : "is unloaded; the next request loads it again";
    announce(`${short(name)} ${loading ? "is loaded" : gone}.`);
  } catch (error) {
    announce(`${short(name)} was not ${loading ? "loaded" : "unloaded"}: ${sentence(error)}.`);
  } finally {
    busy.delete(name);
    showModels();
  }
}

async function pull(event) {
  event.preventDefault();
  const name = $("pull-name").value.trim();
  say($("pull-error"), "");
  announce(`Pulling ${name}.`);
  try {
    for await (const line of pieces(await ask("/api/pull", { body: { model: name } }), "\n")) {
      const told = JSON.parse(line || "{}");
      if (told.error) throw new Trouble(200, told.error);
    }
    announce(`${name} is here.`);
    $("pull-name").value = "";
  } catch (error) {
    say($("pull-error"), `${name} was not pulled: ${sentence(error)}.`);
    announce($("pull-error").textContent, true);
  }
}

function showPulls() {
  const make = (one) => el("li", {}, el("span"), el("progress", { max: 1, "aria-label": `How much of ${one.name} is here` }));
  keep($("pulls"), now.pulls, (one) => one.name, make, (item, one) => {
    const whole = one.total > 0;
    say(item.firstChild, `${one.name}: ${whole ? `${size(one.completed)} of ${size(one.total)}` : one.status}`);
    if (whole) set(item.lastChild, { value: one.completed / one.total });
    else item.lastChild.removeAttribute("value");
  });
}

// --- the chat --------------------------------------------------------------------------------------------------------------------

let turns = []; // as the API takes them

/** An answer as it comes: thinking, words, and what happened to it. `id`: of its request, once it is known. */
class Answer {
  constructor(model) {
    this.model = model;
    this.content = "";
    this.failed = this.resumed = false;
    this.resumes = 0;
    this.id = null;
    this.spoke_at = performance.now();
    this.stopper = new AbortController();
    this.thinking = el("details", { hidden: "" }, el("summary", {}, "Thinking"), el("p"));
    this.words = el("p", { class: "words" });
    this.note = el("p", { class: "note" }, "waiting for the first word");
    this.node = el("article", { class: "answer", "aria-label": `Answer of ${short(model)}` }, this.thinking, this.words, this.note);
    this.mark = null;
  }

  /** Of one chunk. */
  take({ content, reasoning }) {
    if (!content && !reasoning) return;
    this.closeMark();
    say(this.note, "");
    this.spoke_at = performance.now();
    if (reasoning) {
      this.thinking.hidden = false;
      this.thinking.lastChild.append(reasoning);
    }
    if (content) {
      this.content += content;
      if (this.words.lastChild?.nodeType === Node.TEXT_NODE) this.words.lastChild.appendData(content);
      else this.words.append(content);
    }
  }

  comment(text) {
    const prompt = /^prefill (\d+) of (\d+)/.exec(text);
    if (prompt) say(this.note, `reading the prompt: ${prompt[1]} of ${prompt[2]} tokens`);
    const resumed = /^x-mlxd-resumed: (\d+)/.exec(text);
    if (resumed) this.resume(Number(resumed[1]));
  }

  /** Whether the feed, which may be behind, tells of a death from which the stream has not come back. */
  look(flights) {
    const flight = flights.find((one) => one.id === this.id);
    const deaths = flight?.phases.filter(([word]) => word === "lost").length ?? 0;
    if (deaths > this.resumes) this.lose();
  }

  lose() {
    if (this.mark) return;
    this.mark = el("mark", {}, "the engine died; going on in another");
    this.words.append(this.mark);
    announce("The engine died; the answer goes on in another.", true);
  }

  resume(times) {
    this.lose();
    this.resumes = times;
    this.resumed = true;
  }

  /** The first word after a death. */
  closeMark() {
    if (!this.resumed) return;
    say(this.mark, `resumed after ${span(performance.now() - this.spoke_at)}`);
    this.mark = null;
    this.resumed = false;
  }

  end(text, bad = false) {
    say(this.note, text);
    this.note.classList.toggle("bad", bad);
  }
}

async function chat(event) {
  event.preventDefault();
  const text = $("question").value.trim();
  const model = $("model").value;
  if (!text || answer) return;
  if (!model) return announce("There is no model to ask: pull one.");
  $("question").value = "";
  $("talk-empty").hidden = true;
  const mine = turns; // others after "Start anew"
  const told = new Answer(model);
  answer = told;
  $("talk").append(el("p", { class: "question" }, text), told.node);
  mine.push({ role: "user", content: text });
  showTurn(true);
  const began = performance.now();
  try {
    const used = await write(told, mine);
    const speed = `${many(used.completion_tokens, "token")} in ${span(performance.now() - began)}`;
    told.end(used.reason === "length" ? `${speed}; cut off where the model’s room ends` : speed);
    announce("The answer is complete.", true);
  } catch (error) {
    if (error.name === "AbortError") told.end("stopped");
    else fail(told, text, error);
  }
  if (told.content && !told.failed) mine.push({ role: "assistant", content: told.content });
  else mine.pop();
  answer = null;
  showTurn(false);
}

/** Read the answer to its end: {completion_tokens, reason}. Raises Trouble. */
async function write(to, said) {
  const system = $("system").value.trim();
  const messages = system ? [{ role: "system", content: system }, ...said] : said;
  const body = { model: to.model, messages, stream: true, stream_options: { include_usage: true } };
  const response = await ask("/v1/chat/completions", { body, signal: to.stopper.signal });
  const used = { completion_tokens: 0, reason: null };
  to.id = response.headers.get("x-request-id");
  for await (const event of events(response)) {
    if (event.comment) to.comment(event.comment);
    if (!event.data || event.data === "[DONE]") continue;
    const chunk = JSON.parse(event.data);
    if (chunk.error) throw new Trouble(200, chunk.error.message);
    const [choice] = chunk.choices;
    to.take(choice?.delta ?? {});
    stay();
    used.reason = choice?.finish_reason ?? used.reason;
    used.completion_tokens = chunk.usage?.completion_tokens ?? used.completion_tokens;
  }
  if (!used.reason) throw new Trouble(200, "the answer ended too early");
  return used;
}

/** What could not be answered goes back into the box, if that is free. */
function fail(told, text, error) {
  told.failed = true;
  told.end(`${told.content ? "Cut off" : "No answer"}: ${sentence(error)}. Send it again, or choose another model.`, true);
  announce(told.note.textContent, true);
  if (!$("question").value) $("question").value = text;
}

function showTurn(writing) {
  set($("send"), { "aria-disabled": writing });
  set($("stop"), { "aria-disabled": !writing });
  stay.left = false;
  stay();
}

/** Stay at the end of the conversation, if that is where the reader is: once a frame, since it costs a layout. */
function stay() {
  stay.frame ||= requestAnimationFrame(() => {
    stay.frame = 0;
    if (!stay.left) $("talk").scrollTop = $("talk").scrollHeight;
  });
}

$("talk").onscroll = ({ target }) => (stay.left = target.scrollHeight - target.scrollTop - target.clientHeight > 40);

function clearChat() {
  answer?.stopper.abort();
  turns = [];
  $("talk").replaceChildren($("talk-empty"));
  $("talk-empty").hidden = false;
  $("question").focus();
}

// --- the log ---------------------------------------------------------------------------------------------------------------------

/** Read anew every two seconds while somebody can see it. */
async function followLog() {
  let seen = false;
  new IntersectionObserver(([entry]) => (seen = entry.isIntersecting)).observe($("log"));
  for (;;) {
    if (seen && !document.hidden && now) await showLog().catch((error) => say($("log"), `The log cannot be shown: ${sentence(error)}.`));
    await sleep(2000);
  }
}

async function showLog() {
  const log = $("log");
  const told = await (await ask(`/ui/log?of=${encodeURIComponent($("log-of").value)}&lines=200`)).json();
  if (told.of !== $("log-of").value) return;
  const atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  keep($("log-of"), told.names, (name) => name, () => el("option"), say);
  say(log, told.lines.join("\n") || "Nothing has been written yet.");
  if (atEnd || log.dataset.of !== told.of) log.scrollTop = log.scrollHeight;
  log.dataset.of = told.of;
}

// --- what a person does ----------------------------------------------------------------------------------------------------------

$("ask").onsubmit = chat;
$("stop").onclick = () => answer?.stopper.abort();
$("clear").onclick = clearChat;
$("pull").onsubmit = pull;
$("forget").onclick = forgetToken;
$("log-of").onchange = showLog;
$("question").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("ask").requestSubmit();
};

followLog();
follow();
