// The settings of an image in the hash of the page's address. Such a link makes the same image again.

/** @typedef {{prompt: string, seed: string, guidance: string, steps: string, tokens: string, model: string}} Link */

/**
 * @param {import("./source.js").Settings} settings
 * @returns {string} the hash, such as `#prompt=forest:0-40,water:40-&seed=3&guidance=3&steps=25&tokens=256&model=demo`
 */
export function hashOf({ prompt, seed, guidance, steps, tokens, model }) {
    const fields = new URLSearchParams({ prompt, seed, guidance, steps, tokens, model: model.id });
    // These two characters are allowed in a hash, and a course of classes is easier to read with them.
    return "#" + fields.toString().replaceAll("%3A", ":").replaceAll("%2C", ",");
}

/**
 * @param {string} hash
 * @returns {Partial<Link> | null} the fields that the hash has; null if it is no link to an image
 */
export function readHash(hash) {
    const fields = Object.fromEntries(new URLSearchParams(hash.slice(1)));
    return fields.prompt ? fields : null;
}
