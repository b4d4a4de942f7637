// The picture: strips on canvases side by side, because no browser has a canvas as wide as a long landscape.

/** Width of a canvas in pixels. */
const CHUNK = 1024;

/** A picture that grows to the right or to the left. Its element is as wide as the columns that are known. */
export class Landscape {
    #track;
    #chunks = new Map();
    #height = 0;
    #left = 0;
    #right = 0;

    /** @param {HTMLElement} track */
    constructor(track) {
        this.#track = track;
    }

    /** Number of known columns. */
    get columns() {
        return this.#right - this.#left;
    }

    /** Begins an empty picture, which grows from the column `edge` on. */
    begin(height, edge) {
        this.#height = height;
        this.#left = edge;
        this.#right = edge;
        this.#chunks.clear();
        this.#track.replaceChildren();
        this.#layOut();
    }

    /** Draws columns of the picture, over what was there before. */
    draw(image, column) {
        const end = column + image.width;
        for (let index = Math.floor(column / CHUNK); index * CHUNK < end; index++) {
            this.#chunk(index).drawImage(image, column - index * CHUNK, 0);
        }
        this.#left = Math.min(this.#left, column);
        this.#right = Math.max(this.#right, end);
        this.#layOut();
    }

    /** The known columns as a PNG. @throws {Error} if they are more than a canvas can have */
    async toPng() {
        const canvas = canvasOf(this.columns, this.#height);
        const context = canvas.getContext("2d");
        for (const [index, chunk] of this.#chunks) {
            context.drawImage(chunk.canvas, index * CHUNK - this.#left, 0);
        }
        const file = await new Promise((resolve) => canvas.toBlob(resolve, "image/png"));
        if (!file) {
            throw new Error(`This browser cannot save ${this.columns} columns of an image that is not complete.`);
        }
        return file;
    }

    /** The context of a canvas, which is made when its first columns come. */
    #chunk(index) {
        if (!this.#chunks.has(index)) {
            const canvas = canvasOf(CHUNK, this.#height);
            canvas.style.setProperty("--start", index * CHUNK);
            this.#track.append(canvas);
            this.#chunks.set(index, canvas.getContext("2d"));
        }
        return this.#chunks.get(index);
    }

    /** Tells the style sheet what it needs to place the canvases. */
    #layOut() {
        this.#track.style.setProperty("--rows", this.#height);
        this.#track.style.setProperty("--left", this.#left);
        this.#track.style.setProperty("--columns", this.columns);
    }
}

function canvasOf(width, height) {
    return Object.assign(document.createElement("canvas"), { width, height });
}
