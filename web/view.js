// What is seen of the landscape: a scrollable region that follows the newest columns, until a person scrolls back.

/** Distance in pixels within which the view counts as being at the newest columns. */
const NEAR = 2;

export class View {
    #region;
    #growsLeft = false;
    #follows = true;
    /** Distance to the newest columns when it was last looked at. */
    #distance = 0;
    #calm = matchMedia("(prefers-reduced-motion: reduce)");

    /** @param {HTMLElement} region */
    constructor(region) {
        this.#region = region;
        region.addEventListener("scroll", () => this.#look());
        region.addEventListener("keydown", (event) => this.#jump(event));
        region.addEventListener("pointerdown", (event) => this.#drag(event));
        new ResizeObserver(() => this.#follow("instant")).observe(region);
    }

    /** Begins to follow a picture. */
    begin(direction) {
        this.#region.dataset.direction = direction;
        this.#growsLeft = direction === "left";
        this.#follows = true;
        this.#follow("instant");
    }

    /** Calls a function that adds columns to the picture. Columns that are seen stay where they are, or are followed. */
    grow(addColumns) {
        this.#look();
        const width = this.#region.scrollWidth;
        addColumns();
        if (this.#growsLeft) {
            // Columns that are added on the left move all others.
            const added = this.#region.scrollWidth - width;
            this.#region.scrollBy({ left: added, behavior: "instant" });
        }
        this.#follow(this.#calm.matches ? "instant" : "smooth");
    }

    #follow(behavior) {
        if (this.#follows) {
            this.#region.scrollTo({ left: this.#growsLeft ? 0 : this.#region.scrollWidth, behavior });
        }
        this.#distance = this.#measured();
    }

    #measured() {
        const { scrollLeft, scrollWidth, clientWidth } = this.#region;
        return this.#growsLeft ? scrollLeft : scrollWidth - clientWidth - scrollLeft;
    }

    /** Only a person increases the distance to the newest columns by scrolling. */
    #look() {
        const distance = this.#measured();
        if (distance <= NEAR) {
            this.#follows = true;
        } else if (distance > this.#distance + NEAR) {
            this.#follows = false;
        }
        this.#distance = distance;
    }

    /** Home and End. Browsers scroll with them from top to bottom only. */
    #jump(event) {
        const ends = { Home: 0, End: this.#region.scrollWidth };
        if (event.key in ends) {
            event.preventDefault();
            this.#region.scrollTo({ left: ends[event.key], behavior: "instant" });
        }
    }

    /** Scrolls with the mouse. Browsers scroll with a finger themselves. */
    #drag(event) {
        if (event.pointerType !== "mouse" || event.button !== 0) {
            return;
        }
        const ended = new AbortController();
        let last = event.clientX;
        const move = ({ clientX }) => {
            this.#region.scrollBy({ left: last - clientX, behavior: "instant" });
            last = clientX;
        };
        this.#region.setPointerCapture(event.pointerId);
        this.#region.addEventListener("pointermove", move, { signal: ended.signal });
        this.#region.addEventListener("lostpointercapture", () => ended.abort(), { signal: ended.signal });
    }
}
