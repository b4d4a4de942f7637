// The page: connects the controls, the source of landscapes, and the picture.

import { describe, withNames } from "./classes.js";
import { Controls } from "./controls.js";
import { at } from "./elements.js";
import { Landscape } from "./landscape.js";
import { hashOf, readHash } from "./link.js";
import { readPhotograph } from "./photograph.js";
import { Server, SourceError } from "./source.js";
import { Progress, say, showCourse } from "./status.js";
import { View } from "./view.js";

const source = new Server();
const landscape = new Landscape(at("track"));
const view = new View(at("landscape"));
const controls = new Controls((prompt) => attempt(() => amend(prompt)));

/** The image that is generated now, or null: its settings, what stops it, its identifier and its next class. */
let running = null;
/** The image that can be saved, or null: its seed, and its file once it is complete. */
let picture = null;

/** Calls a function, and shows its error. If the source wants a key, the function is called again with the key. */
async function attempt(action) {
    at("error").textContent = "";
    try {
        await action();
    } catch (error) {
        at("error").textContent = error.message;
        if (error instanceof SourceError && error.needsKey) {
            askForKey(() => attempt(action));
        }
    }
}

function askForKey(retry) {
    at("key-form").hidden = false;
    at("key").focus();
    at("key-form").onsubmit = (event) => {
        event.preventDefault();
        source.key = at("key").value;
        at("key-form").hidden = true;
        retry();
    };
}

/** Shows the models. If the address is a link to an image, the image is made. */
async function open() {
    controls.show(await source.models());
    at("run").disabled = false;
    const link = readHash(location.hash);
    if (link) {
        controls.apply(link);
        await start();
    }
}

/** Makes an image. */
async function start() {
    if (!controls.check()) {
        return;
    }
    const image = { settings: controls.settings(), stop: new AbortController(), id: null, next: null };
    begin(image);
    try {
        for await (const event of source.generate(image.settings, image.stop.signal)) {
            await (event.kind === "strip" ? showStrip(image, event) : showWhole(image, event));
        }
    } catch (error) {
        if (!image.stop.signal.aborted) {
            say("");
            throw error;
        }
        say(`Stopped after ${tokensOf(image)} tokens.`);
    } finally {
        running = null;
        at("run").textContent = "Start";
    }
}

/** Prepares the page for an image. */
function begin(image) {
    const { tokens, photograph, seed } = image.settings;
    running = image;
    at("run").textContent = "Stop";
    clear(tokens);
    image.progress = new Progress(tokens + (photograph?.tokens ?? 0));
    showCourse(image.settings);
    // A link cannot hold a photograph.
    showLink(photograph ? "" : hashOf(image.settings));
    say(`Started with seed ${seed}.`);
}

/** Empties the picture. It begins with the photograph, if there is one; `tokens` are added to it. */
function clear(tokens) {
    const { height, tokenWidth } = controls.model;
    const beginning = controls.photograph && controls.fitted().canvas;
    const edge = controls.direction === "left" ? beginning.width + tokens * tokenWidth : 0;
    landscape.begin(height, edge);
    if (beginning) {
        landscape.draw(beginning, controls.direction === "left" ? edge - beginning.width : 0);
    }
    view.begin(controls.direction);
    picture = null;
    at("save").disabled = true;
    at("hint").hidden = true;
}

function showStrip(image, { id, column, image: pixels }) {
    view.grow(() => landscape.draw(pixels, column));
    pixels.close();
    picture = { seed: image.settings.seed, file: null };
    at("save").disabled = false;
    image.progress.show(tokensOf(image));
    image.id = id;
    if (image.next) {
        const prompt = image.next;
        image.next = null;
        attempt(() => amend(prompt));
    }
}

/** Shows the final pixels: strips are previews. */
async function showWhole(image, { file, seed }) {
    const pixels = await createImageBitmap(file);
    view.grow(() => landscape.draw(pixels, 0));
    pixels.close();
    picture = { seed, file };
    at("save").disabled = false;
    image.progress.show(tokensOf(image));
    say(`Complete: ${tokensOf(image)} tokens, seed ${seed}.`);
}

/** Changes the class of the image that is generated. */
async function amend(prompt) {
    const image = running;
    if (!image) {
        return;
    }
    if (!image.id) {
        // The source names the image with its first strip.
        image.next = prompt;
        return;
    }
    const change = await source.amend(image.id, prompt);
    if (!change) {
        say("The image has just ended. The class is used for the next one.");
        return;
    }
    image.settings.prompt = withNames(change.classes, image.settings.model.classes);
    showCourse(image.settings);
    showLink(image.settings.photograph ? "" : hashOf(image.settings));
    say(`${describe(prompt, image.settings.model.classes)} from token ${change.firstToken} on.`);
}

/** Number of tokens that are seen. */
function tokensOf({ settings }) {
    return Math.floor(landscape.columns / settings.model.tokenWidth);
}

/** Puts a link to an image in the address. Without a link the address is that of the empty page. */
function showLink(hash) {
    history.replaceState(null, "", location.pathname + location.search + hash);
    at("copy").disabled = !hash;
}

async function takePhotograph(file) {
    controls.choosePhotograph(await readPhotograph(file));
    if (running) {
        say("The photograph is used for the next image.");
        return;
    }
    forget();
    at("track").setAttribute("aria-label", "The photograph");
    say("Press Start to carry the photograph on.");
}

/** The picture stays, unless it is only the photograph. */
function removePhotograph() {
    controls.choosePhotograph(null);
    if (!running && !picture) {
        forget();
        at("hint").hidden = false;
        say("");
    }
}

/** Forgets the last image. Only the photograph is seen, if there is one. */
function forget() {
    clear(0);
    showLink("");
    at("progress").hidden = true;
    at("course").textContent = "";
}

async function save() {
    const file = picture.file ?? (await landscape.toPng());
    const link = Object.assign(document.createElement("a"), { download: `landscape-${picture.seed}.png` });
    link.href = URL.createObjectURL(file);
    link.click();
    // Some browsers read the file only after this function.
    setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

async function copyLink() {
    // Browsers only lend the clipboard to pages from this machine or over HTTPS.
    if (!navigator.clipboard) {
        throw new Error("This browser does not allow the page to copy. The address of the page is the link.");
    }
    await navigator.clipboard.writeText(location.href);
    say("The link is copied.");
}

at("run").addEventListener("click", () => (running ? running.stop.abort() : attempt(start)));
at("save").addEventListener("click", () => attempt(save));
at("copy").addEventListener("click", () => attempt(copyLink));
at("photograph").addEventListener("change", ({ target }) => attempt(() => takePhotograph(target.files[0])));
at("remove").addEventListener("click", removePhotograph);
addEventListener("dragover", (event) => event.preventDefault());
addEventListener("drop", (event) => {
    event.preventDefault();
    const [file] = event.dataTransfer.files;
    if (file) {
        attempt(() => takePhotograph(file));
    }
});
// A link that is opened in the same window.
addEventListener("hashchange", () => location.reload());
attempt(open);
