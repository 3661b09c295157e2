// The comparison as a picture: both texts, shaded as on the page.
const WIDTH = 1200, EDGE = 40, GAP = 32, LINE = 30, SCALE = 2;
const SERIF = "Georgia, 'DejaVu Serif', serif", SANS = "system-ui, 'DejaVu Sans', sans-serif";

// headline: {title, detail}; prompt: what was asked; sides: [{label, note, tokens: [{text, heat, given}]}]; foot: a line.
export function draw({ headline, prompt, sides, foot }) {
  const canvas = document.createElement("canvas"), context = canvas.getContext("2d");
  const page = new Sheet(context), column = (WIDTH - 2 * EDGE - GAP) / 2;
  const paint = () => {
    let y = page.words(headline.title, { x: EDGE, y: EDGE + 22, width: WIDTH - 2 * EDGE, font: `700 26px ${SANS}`, line: 34 });
    y = page.words(headline.detail, { x: EDGE, y: y + 4, width: WIDTH - 2 * EDGE, font: `15px ${SANS}`, color: "--quiet", line: 22 });
    if (prompt) y = page.words(prompt, { x: EDGE, y: y + 14, width: WIDTH - 2 * EDGE, font: `italic 18px ${SERIF}`, line: 26 });
    const ends = sides.map((side, number) => {
      const x = EDGE + number * (column + GAP);
      const end = page.words(side.label, { x, y: y + 24, width: column, font: `700 18px ${SANS}`, line: 26, color: number ? "--b" : "--a" });
      return page.words(side.note, { x, y: page.tokens(side.tokens, { x, y: end + 10, width: column }) + 8, width: column,
        font: `14px ${SANS}`, color: "--quiet", line: 20 });
    });
    return page.words(foot, { x: EDGE, y: Math.max(...ends) + 20, width: WIDTH - 2 * EDGE, font: `14px ${SANS}`, color: "--quiet", line: 20 });
  };
  const height = Math.ceil(paint() + EDGE / 2);
  Object.assign(canvas, { width: WIDTH * SCALE, height: height * SCALE });
  context.scale(SCALE, SCALE);
  context.fillStyle = page.color("--card");
  context.fillRect(0, 0, WIDTH, height);
  paint();
  return canvas;
}

export function save(canvas, name) {
  return new Promise(resolve => canvas.toBlob(blob => {
    const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(blob), download: name });
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
    resolve(blob);
  }, "image/png"));
}

class Sheet {
  constructor(context) {
    this.context = context;
    this.style = getComputedStyle(document.documentElement);
  }

  color(name) { return this.style.getPropertyValue(name).trim(); }

  // Wrapped words; returns where the next line would stand.
  words(text, { x, y, width, font, line, color = "--ink" }) {
    this.context.font = font;
    this.context.fillStyle = this.color(color);
    for (const paragraph of text.split("\n")) {
      let row = "";
      for (const word of paragraph.split(" ")) {
        const longer = row ? `${row} ${word}` : word;
        if (row && this.context.measureText(longer).width > width) {
          this.context.fillText(row, x, y);
          y += line;
          row = word;
        } else row = longer;
      }
      this.context.fillText(row, x, y);
      y += line;
    }
    return y;
  }

  // Shaded tokens, broken between tokens; returns where the next line would stand.
  tokens(tokens, { x, y, width }) {
    let at = x;
    this.context.font = `18px ${SERIF}`;
    for (const token of tokens) {
      token.text.split("\n").forEach((part, number) => {
        if (number) { at = x; y += LINE; }
        const wide = this.context.measureText(part).width;
        if (at > x && at + wide > x + width) {
          at = x;
          y += LINE;
          part = part.trimStart();
        }
        const drawn = this.context.measureText(part).width;
        this.context.globalAlpha = 0.78 * token.heat;
        this.context.fillStyle = this.color("--heat");
        this.context.fillRect(at, y - 20, drawn, 27);
        this.context.globalAlpha = 1;
        this.context.fillStyle = this.color(token.given && token.heat < 0.3 ? "--quiet" : "--ink");
        this.context.fillText(part, at, y);
        at += drawn;
      });
    }
    return y + LINE;
  }
}
