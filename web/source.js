// The server as a source of landscapes. The rest of the page only knows what is described here, so that another source can
// take the server's place.

import { readEvents } from "./events.js";

/**
 * @typedef {object} Source
 * @property {() => Promise<Model[]>} models the models; the first one is the default
 * @property {(settings: Settings, signal: AbortSignal) => AsyncGenerator<Strip | Done>} generate makes an image, and yields
 *     its strips, and in the end the image. `signal` stops it
 * @property {(id: string, prompt: string) => Promise<Change | null>} amend changes the classes of an image from the next
 *     token on; null if the image has ended
 *
 * All three throw a {@link SourceError}.
 *
 * @typedef {object} Model
 * @property {string} id
 * @property {number} height height of its images in pixels
 * @property {number} tokenWidth columns of pixels per token
 * @property {number} steps default number of steps
 * @property {number} maxTokens largest length of an image in tokens
 * @property {ImageClass[]} classes a class at its number, and none
 *
 * @typedef {{label: string, prompt: string}} ImageClass a class: its text for people, and the prompt that names it
 *
 * @typedef {object} Settings
 * @property {Model} model
 * @property {string} prompt a class, or a course of classes such as `forest:0-40,water:40-`
 * @property {number} seed
 * @property {number} guidance
 * @property {number} steps
 * @property {number} tokens number of tokens to generate
 * @property {Photograph} [photograph]
 *
 * @typedef {object} Photograph a photograph that the image carries on
 * @property {File} file
 * @property {number} tokens its length
 * @property {"right" | "left"} direction the side on which the image grows
 * @property {boolean} keepsPixels whether its pixels stay as they are
 *
 * @typedef {object} Strip columns of an image. They can replace columns that were there before
 * @property {"strip"} kind
 * @property {string} id identifier of the image
 * @property {number} column number of pixels to the left of the strip
 * @property {number} imageWidth width of the whole image in pixels
 * @property {ImageBitmap} image
 *
 * @typedef {object} Done the whole image
 * @property {"done"} kind
 * @property {string} id
 * @property {number} seed
 * @property {Blob} file its PNG
 *
 * @typedef {object} Change
 * @property {number} firstToken first token with the new classes
 * @property {string} classes the course of classes of the whole image, as a prompt
 */

/** An error for people. `needsKey` tells that the source wants a key, or another one. */
export class SourceError extends Error {
    constructor(message, needsKey = false) {
        super(message);
        this.needsKey = needsKey;
    }
}

/** @implements {Source} */
export class Server {
    /** Key of the client, if the server needs one. */
    key = "";

    async models() {
        const response = await this.#request("v1/models");
        const { data } = await response.json();
        return data.map(modelOf);
    }

    async *generate(settings, signal) {
        const body = settings.photograph ? formOf(settings) : JSON.stringify(fieldsOf(settings));
        const path = settings.photograph ? "v1/images/edits" : "v1/images/generations";
        const response = await this.#request(path, { method: "POST", body, signal });
        for await (const { name, data } of this.#events(response)) {
            if (name === "error") {
                throw new SourceError(sentence(data.error.message));
            }
            const file = pngOf(data.b64_json);
            // The names begin with image_generation or image_edit.
            if (name.endsWith(".completed")) {
                yield { kind: "done", id: data.id, seed: data.seed, file };
                return;
            }
            const imageWidth = parseInt(data.image_size ?? sizeOf(settings));
            yield { kind: "strip", id: data.id, column: data.column, imageWidth, image: await createImageBitmap(file) };
        }
        throw new SourceError("The connection ended before the image was complete. Try again.");
    }

    async amend(id, prompt) {
        const path = `v1/images/generations/${id}/classes`;
        const response = await this.#request(path, { method: "POST", body: JSON.stringify({ prompt }) }, [404]);
        if (response.status === 404) {
            return null;
        }
        const { first_token: firstToken, classes } = await response.json();
        return { firstToken, classes };
    }

    /** Sends a request. `expected` are statuses that are no errors, besides those of success. */
    async #request(path, options = {}, expected = []) {
        const headers = this.key ? { Authorization: `Bearer ${this.key}` } : {};
        // A form sets its content type itself.
        if (typeof options.body === "string") {
            headers["Content-Type"] = "application/json";
        }
        const response = await reached(fetch(path, { ...options, headers }));
        if (response.ok || expected.includes(response.status)) {
            return response;
        }
        throw await errorOf(response);
    }

    /** The events of a response. */
    async *#events(response) {
        const events = readEvents(response.body);
        for (;;) {
            const { value, done } = await reached(events.next());
            if (done) {
                return;
            }
            yield value;
        }
    }
}

function modelOf({ id, height, token_width: tokenWidth, steps, max_tokens: maxTokens = 1024, classes, class_names: names }) {
    const numbers = Array.from({ length: classes }, (_, number) => number);
    const known = numbers.map((number) => ({ label: names?.[number] ?? `${number}`, prompt: promptOf(number, names) }));
    return { id, height, tokenWidth, steps, maxTokens, classes: [...known, { label: "none", prompt: "none" }] };
}

/** The prompt of a class: its name, or its number if a course of classes cannot have the name, or two classes share it. */
function promptOf(number, names) {
    const name = names?.[number] ?? "";
    const isUsable = /^[^\s\d,:][^,:]*$/.test(name) && name !== "none" && names.indexOf(name) === names.lastIndexOf(name);
    return isUsable ? name : `${number}`;
}

/** The fields of a request. */
function fieldsOf(settings) {
    const { model, prompt, seed, guidance, steps } = settings;
    const sampling = { seed, guidance_scale: guidance, num_inference_steps: steps };
    return { model: model.id, prompt, size: sizeOf(settings), ...sampling, stream: true };
}

/** The form of a request that carries a photograph on. */
function formOf(settings) {
    const { file, direction, keepsPixels } = settings.photograph;
    const form = new FormData();
    for (const [name, value] of Object.entries({ ...fieldsOf(settings), direction, keep_prefix_pixels: keepsPixels })) {
        form.append(name, value);
    }
    form.append("image", file);
    return form;
}

/** The size of the whole image. */
function sizeOf({ model, tokens, photograph }) {
    return `${(tokens + (photograph?.tokens ?? 0)) * model.tokenWidth}x${model.height}`;
}

function pngOf(base64) {
    return new Blob([Uint8Array.from(atob(base64), (character) => character.charCodeAt(0))], { type: "image/png" });
}

/** Waits for the server. Browsers have no words for people if it cannot be reached. */
async function reached(answer) {
    try {
        return await answer;
    } catch (error) {
        if (error instanceof TypeError) {
            throw new SourceError("The server cannot be reached. Check that it runs, and try again.");
        }
        throw error;
    }
}

/** The error of a response that is not a success. */
async function errorOf(response) {
    const body = await response.json().catch(() => ({}));
    const message = sentence(body.error?.message ?? `the server answered with status ${response.status}`);
    const hint = [429, 503].includes(response.status) ? " Wait a moment, and try again." : "";
    return new SourceError(message + hint, response.status === 401);
}

function sentence(text) {
    return `${text[0].toUpperCase()}${text.slice(1)}.`;
}
