// What is told about an image: its progress, its classes, and messages.

import { describe } from "./classes.js";
import { at } from "./elements.js";

/** The tokens of an image so far, and the time that one takes. */
export class Progress {
    #total;
    /** Number of tokens with the first strip, and when it came. The time before has the wait in the queue in it. */
    #first = null;

    /** @param {number} total number of tokens of the whole image */
    constructor(total) {
        this.#total = total;
        at("progress").hidden = false;
        at("meter").max = total;
        this.#write(0, "");
    }

    /** Shows the number of tokens that are known. */
    show(tokens) {
        const now = performance.now();
        this.#first ??= { tokens, now };
        const more = tokens - this.#first.tokens;
        this.#write(tokens, more > 0 ? ` · ${duration((now - this.#first.now) / more)} per token` : "");
    }

    #write(tokens, speed) {
        at("meter").value = tokens;
        at("counts").textContent = `${tokens} of ${this.#total} tokens${speed}`;
    }
}

function duration(milliseconds) {
    return milliseconds < 1000 ? `${Math.round(milliseconds)} ms` : `${(milliseconds / 1000).toFixed(1)} s`;
}

/** Shows the classes of an image. @param {import("./source.js").Settings} settings */
export function showCourse({ prompt, model }) {
    const course = describe(prompt, model.classes);
    at("course").textContent = `Classes: ${course}`;
    at("track").setAttribute("aria-label", `Landscape: ${course}`);
}

/** Tells something that a screen reader reads out. */
export function say(text) {
    at("message").textContent = text;
}
