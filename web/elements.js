// Elements of the page.

/** The element with this identifier. @param {string} id */
export function at(id) {
    return document.getElementById(id);
}
