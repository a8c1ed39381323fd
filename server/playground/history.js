// What a canvas showed before each change.

const MOST = 20; // a MiB each

export class History {
  #ink; #past = []; #future = [];

  constructor(ink) { this.#ink = ink; }

  /** Keep what is there, before it changes. */
  keep() {
    this.#past = [...this.#past, this.#now()].slice(-MOST);
    this.#future = [];
  }

  forget() { this.#past = []; this.#future = []; }

  /** Show what was there before; says whether there was anything. */
  undo() { return this.#go(this.#past, this.#future); }
  redo() { return this.#go(this.#future, this.#past); }

  #now() { return this.#ink.getImageData(0, 0, this.#ink.canvas.width, this.#ink.canvas.height); }

  #go(from, to) {
    if (!from.length) return false;
    to.push(this.#now());
    this.#ink.putImageData(from.pop(), 0, 0);
    return true;
  }
}
