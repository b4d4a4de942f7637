// A photograph that an image carries on.

/**
 * @param {File} file
 * @returns {Promise<{file: File, image: ImageBitmap}>}
 * @throws {Error} if the browser cannot read it
 */
export async function readPhotograph(file) {
    try {
        return { file, image: await createImageBitmap(file) };
    } catch {
        throw new Error(`${file.name} cannot be read as a picture. Choose a PNG or JPEG.`);
    }
}

/**
 * Scales a photograph to the model's height, and cuts it to whole tokens on the side that is not carried on, as the server
 * does.
 *
 * @param {ImageBitmap} image
 * @param {import("./source.js").Model} model
 * @param {"right" | "left"} direction
 * @returns {{tokens: number, canvas: HTMLCanvasElement}}
 */
export function fit(image, model, direction) {
    const scaled = Math.round((image.width * model.height) / image.height);
    const tokens = Math.max(1, Math.floor(scaled / model.tokenWidth));
    const canvas = document.createElement("canvas");
    canvas.width = tokens * model.tokenWidth;
    canvas.height = model.height;
    const cut = direction === "right" ? scaled - canvas.width : 0;
    canvas.getContext("2d").drawImage(image, -cut, 0, scaled, model.height);
    return { tokens, canvas };
}
