// Classes: their buttons, and courses of classes as text.

/** Number of classes above which there is a field that filters them. */
const MANY = 20;

/** A group of buttons, one per class. One of them is pressed. */
export class ClassButtons {
    #box;
    #filter;
    #onPress;

    /**
     * @param {HTMLElement} box
     * @param {HTMLInputElement} filter
     * @param {(prompt: string) => void} onPress receives the class of a button that was pressed
     */
    constructor(box, filter, onPress) {
        this.#box = box;
        this.#filter = filter;
        this.#onPress = onPress;
        filter.addEventListener("input", () => this.#applyFilter());
    }

    /** Shows the classes of a model. @param {import("./source.js").ImageClass[]} classes */
    show(classes) {
        this.#box.replaceChildren(...classes.map((one) => this.#button(one)));
        this.#filter.hidden = classes.length <= MANY;
        this.#filter.value = "";
    }

    /** Marks the class that a prompt has in the end. */
    press(prompt) {
        const last = spansOf(prompt).at(-1).name;
        for (const button of this.#box.children) {
            button.setAttribute("aria-pressed", button.value === last);
        }
    }

    #button({ label, prompt }) {
        const button = document.createElement("button");
        button.type = "button";
        button.textContent = label;
        button.value = prompt;
        button.addEventListener("click", () => this.#onPress(prompt));
        return button;
    }

    #applyFilter() {
        const wanted = this.#filter.value.trim().toLowerCase();
        for (const button of this.#box.children) {
            button.hidden = !button.textContent.toLowerCase().includes(wanted);
        }
    }
}

/**
 * The spans of a prompt: `forest:0-40,water:40-` has two, every other prompt is one class.
 *
 * @returns {{name: string, begin: string, end: string}[]}
 */
function spansOf(prompt) {
    const spans = prompt.split(",").map((part) => part.match(/^\s*(?<name>.+):(?<begin>\d+)-(?<end>\d*)\s*$/)?.groups);
    return spans.every(Boolean) ? spans : [{ name: prompt, begin: "0", end: "" }];
}

/** A prompt with the names that a model's classes have in prompts, in place of their numbers. */
export function withNames(prompt, classes) {
    const name = (text) => classes[text]?.prompt ?? text;
    const spans = spansOf(prompt);
    if (spans.length === 1) {
        return name(spans[0].name);
    }
    return spans.map((span) => `${name(span.name)}:${span.begin}-${span.end}`).join(",");
}

/** A prompt for people: `forest 0–39, water from token 40 on`. Prompts exclude the end of a span, people include it. */
export function describe(prompt, classes) {
    const label = (name) => classes.find((one) => one.prompt === name)?.label ?? name;
    const spans = spansOf(prompt);
    if (spans.length === 1) {
        return label(spans[0].name);
    }
    const range = ({ begin, end }) => (end === "" ? `from token ${begin} on` : `${begin}–${end - 1}`);
    return spans.map((span) => `${label(span.name)} ${range(span)}`).join(", ");
}
