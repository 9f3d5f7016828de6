/** Keeps the gallery's pictures in this browser. Where it may not, they live until the page is closed. */

const NAME = "layered";
const PICTURES = "pictures";

export const MAX_KEPT = 100;

export class Store {
  #database = null;

  /** Whether what is drawn is still there after a reload. */
  get keeps() {
    return this.#database !== null;
  }

  /** Opens it; the pictures that are there, newest first. */
  async open() {
    try {
      const opening = indexedDB.open(NAME, 1);
      opening.onupgradeneeded = () => opening.result.createObjectStore(PICTURES, { keyPath: "id" });
      this.#database = await settled(opening);
      return (await settled(this.#pictures("readonly").getAll())).sort(newestFirst);
    } catch {
      this.#database = null;
      return [];
    }
  }

  async put(item) {
    await this.#change((pictures) => pictures.put(item));
  }

  async remove(items) {
    await this.#change((pictures) => items.map((item) => pictures.delete(item.id)));
  }

  /** A full disk, or a browser that wants nothing kept, must not keep anybody from drawing. */
  async #change(work) {
    if (!this.#database) return;
    try {
      const pictures = this.#pictures("readwrite");
      work(pictures);
      await new Promise((resolve, reject) => {
        pictures.transaction.oncomplete = resolve;
        pictures.transaction.onabort = () => reject(pictures.transaction.error);
      });
    } catch {
      this.#database = null;
    }
  }

  #pictures(mode) {
    return this.#database.transaction(PICTURES, mode).objectStore(PICTURES);
  }
}

/** Ids begin with the time. */
export const newestFirst = (one, other) => (one.id < other.id ? 1 : -1);

const settled = (request) =>
  new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
