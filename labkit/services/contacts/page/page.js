// The page of imports: all that it knows is in `state`, `show` draws that, and a `Connection` brings notices.
//
// A notice that comes twice changes nothing the second time. Its id is made of a stage, a job and a line, and the state
// keeps each of these once. So notices that are sent twice, and a state that is read again in between, do no harm.

const SHOWN = 1000; // bad rows of an import that are listed; the others are counted
const LISTED = 20; // imports of a channel in the answer of Contacts Jobs after a reload
const FRAME = 50; // ms from one picture to the next
const SILENCE = 25_000; // ms: the service says something every 10 s; if it does not, the connection is dead
const SHORTEST = 300, LONGEST = 15_000; // ms from one attempt to connect to the next
const OPEN_ANOTHER = new Set([4403, 4410]); // the channel is not ours, or its time is over

const state = {
  connection: { line: "opening", text: "Connecting …" }, // line: opening, open, lost
  news: "", // what happened last, for the status line, which screen readers read out
  uploads: [], // {file, sent, problem, status}: under way, waiting, or not taken
  imports: new Map(), // request → import
  gaps: false, // this page may have missed notices
};

// -- What a tab keeps through a reload ---------------------------------------------------------------------------------

const KEPT = `imports ${location.pathname}`; // behind a proxy all services have one origin, and so one storage

function keep() {
  try {
    sessionStorage.setItem(KEPT, JSON.stringify(kept));
  } catch {
    // This browser keeps nothing for a page in a frame: a reload begins anew.
  }
}

function recall() {
  try {
    return JSON.parse(sessionStorage.getItem(KEPT));
  } catch {
    return null;
  }
}

const kept = recall() ?? { channel: "", key: "", position: "", names: {} }; // names: of files, by request

// -- What happens to imports -------------------------------------------------------------------------------------------

function importOf(request) {
  if (!state.imports.has(request)) {
    state.imports.set(request, {
      name: kept.names[request] ?? `Import ${state.imports.size + 1}`,
      total: 0, // jobs; 0 until a notice says how many
      done: 0,
      failed: 0,
      begun: new Set(), // jobs
      unseen: 0, // jobs that have ended, and whose beginning this page has missed
      lines: new Set(), // of all bad rows
      bad: [], // {line, reason} of the first ones, in order of their lines
      badRows: 0, // at least so many: the state has their number, and details of the first ones
      over: false, // this page gets no more notices of it
    });
  }
  return state.imports.get(request);
}

const ended = (one) => one.done + one.failed;
const completed = (one) => one.total > 0 && ended(one) === one.total;

function hearNotice({ stage, request, total, job, line, reason, done = 0, failed = 0 }) {
  const one = importOf(request);
  if (stage === "accepted" && !one.total) state.news = `${one.name} was accepted: ${count(total, "job")}.`;
  one.total = total;
  if (stage === "consumed") one.begun.add(job);
  const hasMoreBadRows = stage === "failed row" && addBadRow(one, { line, reason });
  const goesOn = (stage === "processed" || stage === "completed") && progressed(one, done, failed);
  if (!completed(one) || !(hasMoreBadRows || goesOn)) return;
  state.news = `${one.name}: ${progressText(one)}. ${badRowsText(one)}`;
  if (goesOn && state.gaps) readState();
}

/** Whether these figures are newer than the known ones. Only a failed job may change: a replay may do it. */
function progressed(one, done, failed) {
  if (done + failed < ended(one) || (done + failed === ended(one) && done <= one.done)) return false;
  const quarters = () => Math.floor((4 * ended(one)) / one.total);
  const before = quarters();
  [one.done, one.failed] = [done, failed];
  one.unseen = Math.max(one.unseen, ended(one) - one.begun.size);
  if (quarters() > before) state.news = `${one.name}: ${progressText(one)}.`; // not each job: it is read out
  return true;
}

/** Add a bad row. Returns whether it is new. */
function addBadRow(one, row) {
  if (one.lines.has(row.line)) return false;
  one.lines.add(row.line);
  let at = one.bad.length; // jobs end in any order, but mostly in the order of the file
  while (at > 0 && one.bad[at - 1].line > row.line) at -= 1;
  one.bad.splice(at, 0, row);
  one.bad.length = Math.min(one.bad.length, SHOWN);
  return true;
}

const badRowsOf = (one) => Math.max(one.lines.size, one.badRows);

/** Ask Contacts Jobs for the state of this channel's imports, again until it answers. */
async function readState() {
  state.gaps = true;
  const { channel, key } = kept;
  const url = `channels/${channel}/imports`;
  const ask = () => fetch(url, { headers: { "Channel-Key": key } }).then((answer) => answer.ok && answer.json());
  let imports = null;
  for (let failures = 0; !imports; failures += 1) {
    imports = await ask().catch(() => null);
    if (channel !== kept.channel) return; // another channel was opened meanwhile
    if (!imports) await sleep(backOff(failures));
  }
  for (const { request, total, done, failed, bad_rows, bad_row_count } of imports) {
    const one = importOf(request);
    one.total = total;
    progressed(one, done, failed);
    for (const row of bad_rows) addBadRow(one, row);
    one.badRows = Math.max(one.badRows, bad_row_count);
  }
  show(state);
}

// -- The connection ----------------------------------------------------------------------------------------------------

/** Keeps a WebSocket open: with back-off, from the last position on, and with a new channel when this one has ended. */
class Connection {
  #failures = 0;
  #services = null; // the address of the WebSocket service, with a slash in the end
  #connected = false; // ever
  #wake = () => {};

  constructor() {
    window.addEventListener("online", () => this.#wake());
  }

  async run() {
    for (;;) {
      try {
        this.#services ??= await findService();
        if (!kept.channel) await this.#openChannel();
        const { code, reason } = await this.#listen();
        if (OPEN_ANOTHER.has(code)) forgetChannel();
        this.#lost(code === 4503 && reason);
      } catch (error) {
        this.#lost(error instanceof Problem && error.message);
      }
      await this.#pause();
    }
  }

  async #openChannel() {
    const answer = await fetch(`${this.#services}channels`, { method: "POST" });
    if (!answer.ok) throw new Problem(await answer.text());
    const { channel, key, position } = await answer.json();
    Object.assign(kept, { channel, key, position });
    keep();
    sendUploads();
  }

  /** Receive messages until the connection ends. Resolves to the reason why it did. */
  #listen() {
    return new Promise((resolve) => {
      const socket = new WebSocket(`${this.#services.replace(/^http/, "ws")}notifications`);
      let silence;
      const end = (why) => {
        clearTimeout(silence);
        socket.onopen = socket.onmessage = socket.onclose = null;
        socket.close();
        resolve(why);
      };
      const wait = () => {
        clearTimeout(silence);
        silence = setTimeout(end, SILENCE, { code: 1006, reason: "" });
      };
      wait();
      socket.onopen = () => {
        const { channel, key, position } = kept;
        socket.send(JSON.stringify({ channel, key, position }));
      };
      socket.onmessage = ({ data }) => {
        const message = JSON.parse(data);
        wait();
        if (message.code) end(message); // before the close: a proxy may not pass its code on
        else this.#receive(message);
      };
      socket.onclose = end;
    });
  }

  #receive({ outcome, position, notice }) {
    if (outcome) {
      this.#failures = 0;
      this.#connected = true;
      state.connection = { line: "open", text: "Connected" };
      if (outcome === "missed") state.news = "Connected again: what was missed is shown.";
      if (outcome === "start over") this.#startOver();
    }
    if (notice) hearNotice(notice);
    kept.position = position;
    keep();
    show(state);
  }

  async #startOver() {
    await readState();
    if (!state.imports.size) return; // there was nothing to miss
    state.news = "Too much was missed: the state was read again.";
    show(state);
  }

  #lost(why) {
    const where = `The notification service cannot be reached, or does not serve pages of ${location.origin}.`;
    const text = this.#connected ? "Connection lost, catching up …" : `${why || where} Trying again …`;
    state.connection = { line: "lost", text };
    show(state);
  }

  async #pause() {
    await Promise.race([sleep(backOff(this.#failures++)), new Promise((resolve) => (this.#wake = resolve))]);
  }
}

/** An error with the words of a service, to be shown as they are. */
class Problem extends Error {}

/** The address of the WebSocket service: on another port of this host, or behind the same proxy. */
async function findService() {
  const answer = await fetch("settings.json");
  const { notifications_port: port } = await answer.json();
  const behind = location.pathname.match(/^(.*\/proxy\/)\d+\//); // as jupyter-server-proxy does it
  const address = new URL(behind ? `${behind[1]}${port}/` : "/", location.href);
  if (!behind) address.port = port;
  return address.href;
}

function forgetChannel() {
  Object.assign(kept, { channel: "", key: "", position: "", names: {} });
  keep();
  for (const one of state.imports.values()) one.over = true;
}

const sleep = (ms) => new Promise((resolve) => setTimeout(resolve, ms));

/** Ever longer, and different for each page: else all pages would come back at once to a restarted service. */
const backOff = (failures) => Math.min(LONGEST, SHORTEST * 2 ** failures) * (0.5 + Math.random() / 2);

// -- Uploads: one after the other --------------------------------------------------------------------------------------

function take(files) {
  state.uploads = state.uploads.filter((upload) => !upload.problem); // whoever chooses files again has read them
  state.uploads.push(...[...files].map((file) => ({ file, sent: 0, problem: "", status: 0 })));
  sendUploads();
}

let sending = false;

async function sendUploads() {
  show(state);
  let upload;
  while (!sending && kept.channel && (upload = state.uploads.find((one) => !one.problem))) {
    sending = true;
    const { status, text, request } = await send(upload);
    sending = false;
    if (status === 202) {
      state.uploads.splice(state.uploads.indexOf(upload), 1);
      kept.names[request] = upload.file.name;
      Object.keys(kept.names).slice(0, -LISTED).forEach((old) => delete kept.names[old]);
      keep();
      importOf(request).name = upload.file.name; // the answer may come before its first notice, or after
    } else {
      Object.assign(upload, { status, problem: text || "It did not arrive: the connection broke, or nobody answers." });
      state.news = `${upload.file.name} was not taken: ${upload.problem}`;
    }
    show(state);
  }
}

/** Send a file, by XMLHttpRequest: `fetch` does not say how much of a body is sent. */
function send(upload) {
  return new Promise((resolve) => {
    const asked = new XMLHttpRequest();
    asked.open("POST", `channels/${kept.channel}/imports`);
    asked.upload.onprogress = ({ loaded }) => {
      upload.sent = loaded;
      show(state);
    };
    asked.onloadend = () =>
      resolve({ status: asked.status, text: asked.responseText.trim(), request: asked.getResponseHeader("Import-Request") });
    asked.send(upload.file);
  });
}

// -- What is seen ------------------------------------------------------------------------------------------------------

const number = new Intl.NumberFormat("en");
const count = (many, thing) => `${number.format(many)} ${thing}${many === 1 ? "" : "s"}`;
const megabytes = (bytes) => (bytes / 1e6).toFixed(1);

function progressText(one) {
  const jobs = count(one.total, "job");
  if (!one.total) return "Uploaded";
  if (completed(one)) return one.failed ? `Completed, ${number.format(one.failed)} of ${jobs} failed` : `Completed, ${jobs}`;
  const failed = one.failed ? `, ${number.format(one.failed)} failed` : "";
  if (ended(one)) return `${number.format(ended(one))} of ${jobs} processed${failed}`;
  return `Accepted, ${jobs}`;
}

function workingText(one) {
  if (completed(one)) return "";
  if (one.over) return "its channel has ended: this page gets no more news of it";
  const working = one.begun.size + one.unseen - ended(one);
  return working > 0 ? `${count(working, "job")} being worked on` : "";
}

function badRowsText(one) {
  const many = badRowsOf(one);
  if (!many) return "";
  return many === 1 ? "1 row is not imported" : `${number.format(many)} rows are not imported`;
}

function uploadText({ file, sent, problem }) {
  if (problem) return `Not taken: ${problem}`;
  if (!kept.channel) return "Waiting for the notification service …";
  if (!sent && sending) return "Waiting for the one before …";
  if (sent >= file.size) return "Uploaded, being checked …";
  return `${megabytes(sent)} of ${megabytes(file.size)} MB uploaded`;
}

let waiting = false;

/** Show the state soon, but only some times in a second, however much happens. */
function show(state) {
  if (waiting) return;
  waiting = true;
  setTimeout(() => {
    waiting = false;
    const line = byId("connection");
    line.dataset.line = state.connection.line;
    write(line, state.connection.text);
    write(byId("news"), state.news);
    arrange(byId("uploads"), state.uploads, "upload", showUpload);
    arrange(byId("imports"), [...state.imports.values()].reverse(), "import", showImport);
  }, FRAME);
}

function showUpload(element, upload) {
  const { file, sent, problem, status } = upload;
  element.classList.toggle("problem", problem !== "");
  write(element.querySelector("h2"), file.name);
  write(element.querySelector(".now"), uploadText(upload));
  measure(element.querySelector("progress"), sent, file.size, `Upload of ${file.name}`);
  element.querySelector("progress").hidden = problem !== "";
  const again = element.querySelector(".again");
  again.hidden = !problem || status === 400 || status === 413; // the same file would be refused again
  again.onclick = () => {
    Object.assign(upload, { sent: 0, problem: "", status: 0 });
    sendUploads();
  };
}

function showImport(element, one) {
  write(element.querySelector("h2"), one.name);
  write(element.querySelector(".working"), workingText(one));
  const now = element.querySelector(".now");
  write(now, progressText(one));
  now.classList.toggle("failed", one.failed > 0);
  const bar = element.querySelector("progress");
  measure(bar, ended(one), one.total, `Jobs of ${one.name}`);
  bar.classList.toggle("completed", completed(one));
  showBadRows(element.querySelector(".bad"), one);
}

function showBadRows(element, one) {
  const many = badRowsOf(one);
  element.hidden = many === 0;
  write(element.querySelector("h3"), badRowsText(one));
  element.querySelector(".rows").setAttribute("aria-label", `Bad rows of ${one.name}`);
  write(element.querySelector(".more"), many > one.bad.length ? `and ${number.format(many - one.bad.length)} more` : "");
  const body = element.querySelector("tbody");
  let next = body.firstElementChild; // existing rows stay: only new ones are put between them
  for (const row of one.bad) {
    if (next?.dataset.line === String(row.line)) next = next.nextElementSibling;
    else body.insertBefore(tableRow(row), next);
  }
  while (body.children.length > one.bad.length) body.lastElementChild.remove();
}

function tableRow({ line, reason }) {
  const made = document.createElement("tr");
  made.dataset.line = line;
  made.append(cell(number.format(line)), cell(reason));
  return made;
}

function cell(text) {
  const made = document.createElement("td");
  made.textContent = text;
  return made;
}

/** A bar says in words, too, what it measures. */
function measure(bar, value, most, label) {
  bar.max = Math.max(1, most);
  bar.value = value;
  bar.setAttribute("aria-label", label);
}

/** Texts come from files and services, so they are never markup. An unchanged text is not read out again. */
function write(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

const elements = new WeakMap(); // of uploads and imports: an element stays, and so does what has the focus

function arrange(list, things, template, showOne) {
  for (const thing of things) {
    if (!elements.has(thing)) elements.set(thing, byId(template).content.firstElementChild.cloneNode(true));
    showOne(elements.get(thing), thing);
  }
  const wanted = things.map((thing) => elements.get(thing));
  for (const element of [...list.children]) if (!wanted.includes(element)) element.remove();
  wanted.forEach((element, at) => {
    if (list.children[at] !== element) list.insertBefore(element, list.children[at] ?? null);
  });
}

function byId(id) {
  return document.getElementById(id);
}

// -- The start ---------------------------------------------------------------------------------------------------------

byId("choose").addEventListener("click", () => byId("files").click());
byId("files").addEventListener("change", ({ target }) => {
  take(target.files);
  target.value = ""; // the same file may be chosen again
});
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault(); // else the browser opens a file that misses the field
    byId("drop").classList.toggle("over", kind === "dragover");
    if (kind === "drop") take(event.dataTransfer.files);
  });
}
show(state);
if (kept.channel) {
  Object.keys(kept.names).forEach(importOf); // after a reload
  readState();
}
new Connection().run();
