// The controls: what the next image is made of.

import { ClassButtons, withNames } from "./classes.js";
import { at } from "./elements.js";
import { fit } from "./photograph.js";

/** Seeds that the button draws are below this number. */
const SEEDS = 2 ** 32;

export class Controls {
    /** The model that is chosen. */
    model;
    /** Class or classes of the next image. */
    prompt;
    /** The photograph that the next image carries on: its file and its pixels, or null. */
    photograph = null;
    #models = [];
    #classes;

    /** @param {(prompt: string) => void} onClass receives the class whose button was pressed */
    constructor(onClass) {
        this.#classes = new ClassButtons(at("classes"), at("filter"), (prompt) => {
            this.choosePrompt(prompt);
            onClass(prompt);
        });
        at("random").addEventListener("click", () => this.#drawSeed());
        at("model").addEventListener("change", () => this.#chooseModel(at("model").value));
        at("tokens").addEventListener("input", () => this.#showSize());
        this.#drawSeed();
    }

    /** Shows models. The first one is chosen. @param {import("./source.js").Model[]} models */
    show(models) {
        this.#models = models;
        at("model").replaceChildren(...models.map(({ id }) => new Option(id)));
        at("model-box").hidden = models.length === 1;
        this.#chooseModel(models[0].id);
    }

    /** Sets the controls as a link says. @param {Partial<import("./link.js").Link>} link */
    apply(link) {
        if (link.model) {
            this.#chooseModel(link.model);
        }
        for (const name of ["seed", "guidance", "steps", "tokens"].filter((name) => name in link)) {
            at(name).value = link[name];
        }
        this.#showSize();
        this.choosePrompt(withNames(link.prompt, this.model.classes));
    }

    choosePrompt(prompt) {
        this.prompt = prompt;
        this.#classes.press(prompt);
    }

    /** Takes a photograph, or removes it. @param {{file: File, image: ImageBitmap} | null} photograph */
    choosePhotograph(photograph) {
        this.photograph = photograph;
        at("photograph-box").hidden = !photograph;
        // The field shows the name of a photograph that was dropped, too.
        const files = new DataTransfer();
        if (photograph) {
            files.items.add(photograph.file);
        }
        at("photograph").files = files.files;
    }

    /** The side on which the image grows. */
    get direction() {
        return this.photograph ? document.querySelector("input[name=direction]:checked").value : "right";
    }

    /** The photograph as the model sees it: its length in tokens and its pixels. */
    fitted() {
        return fit(this.photograph.image, this.model, this.direction);
    }

    /** Whether all fields can be used. The browser shows what is wrong with one that cannot. */
    check() {
        return at("controls").reportValidity();
    }

    /** @returns {import("./source.js").Settings} */
    settings() {
        const [seed, guidance, steps, tokens] = ["seed", "guidance", "steps", "tokens"].map((id) => at(id).valueAsNumber);
        const photograph = this.photograph && {
            file: this.photograph.file,
            tokens: this.fitted().tokens,
            direction: this.direction,
            keepsPixels: at("keep").checked,
        };
        return { model: this.model, prompt: this.prompt, seed, guidance, steps, tokens, photograph };
    }

    #chooseModel(id) {
        const model = this.#models.find((model) => model.id === id);
        if (!model) {
            throw new Error(`The server has no model ${id}.`);
        }
        this.model = model;
        at("model").value = id;
        at("steps").value = model.steps;
        at("tokens").max = model.maxTokens;
        at("tokens").value = Math.min(at("tokens").value, model.maxTokens);
        this.#showSize();
        this.#classes.show(model.classes);
        this.choosePrompt(model.classes[0].prompt);
    }

    #showSize() {
        const { tokenWidth, height } = this.model;
        const tokens = at("tokens").valueAsNumber || 0;
        at("size").textContent = `${tokens} tokens are ${tokens * tokenWidth} × ${height} pixels.`;
    }

    #drawSeed() {
        at("seed").value = Math.floor(Math.random() * SEEDS);
    }
}
