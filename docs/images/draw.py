"""Draws the diagrams of docs/responses.md: `python docs/images/draw.py` writes the SVG files anew.

Each has a background of its own and two sets of colours, so it can be read in light and dark mode.
"""

from html import escape
from pathlib import Path

HERE = Path(__file__).parent

STYLE = """
  svg { --paper: #ffffff; --line: #8b949e; --text: #1f2328; --soft: #57606a; --edge: #d0d7de;
        --grey: #f3f5f7; --blue: #ddeeff; --green: #d9f5e1; --amber: #fff0cc; --red: #cf222e; }
  @media (prefers-color-scheme: dark) {
    svg { --paper: #161b22; --line: #8b949e; --text: #e6edf3; --soft: #a9b4c0; --edge: #30363d;
          --grey: #262d36; --blue: #173a5e; --green: #17472a; --amber: #4d3a0c; --red: #ff7b72; }
  }
  text { font: 14px system-ui, "Segoe UI", "Noto Sans", Helvetica, Arial, sans-serif;
         fill: var(--text); }
  .title { font-size: 17px; font-weight: 600; }
  .name { font-weight: 600; }
  .soft { font-size: 13px; fill: var(--soft); }
  .code { font: 13px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
  .middle { text-anchor: middle; } .end { text-anchor: end; }
  .red { fill: var(--red); }
  .paper { fill: var(--paper); stroke: var(--edge); }
  .box { stroke: var(--line); }
  .grey { fill: var(--grey); } .blue { fill: var(--blue); }
  .green { fill: var(--green); } .amber { fill: var(--amber); }
  .arrow { stroke: var(--line); stroke-width: 1.6; fill: none; marker-end: url(#head); }
  .thick { stroke-width: 2.6; }
  .many { stroke: var(--red); }
  .dashed { stroke-dasharray: 5 4; }
  .head { fill: var(--line); }
"""


class Drawing:
    def __init__(self, width: int, height: int, says: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
            f'width="{width}" height="{height}" role="img">',
            f"<title>{escape(says)}</title>",
            f"<style>{STYLE}</style>",
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" '
            'markerHeight="8" markerUnits="userSpaceOnUse" orient="auto-start-reverse">'
            '<path class="head" d="M0 0 L8 4 L0 8 z"/></marker></defs>',
            f'<rect class="paper" x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" '
            'rx="10"/>',
        ]

    def text(self, x: int, y: int, text: str, kind: str = "") -> None:
        self._parts.append(f'<text class="{kind}" x="{x}" y="{y}">{escape(text)}</text>')

    def box(self, x: int, y: int, width: int, height: int, colour: str, *lines: str) -> None:
        """A box with its name and, below, what is to be said of it: code between backticks."""
        self._parts.append(
            f'<rect class="box {colour}" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>'
        )
        top = y + height // 2 - 9 * (len(lines) - 1) + 5
        for number, line in enumerate(lines):
            kind = "name" if number == 0 else "code" if line.startswith("`") else "soft"
            middle = x + width // 2
            self.text(middle, top + 18 * number, line.strip("`"), f"{kind} middle")

    def arrow(self, points: str, kind: str = "") -> None:
        self._parts.append(f'<path class="arrow {kind}" d="M{points.replace(" ", " L")}"/>')

    def save(self, name: str) -> None:
        (HERE / name).write_text("\n".join([*self._parts, "</svg>\n"]))


def way_of_a_response() -> Drawing:
    drawing = Drawing(
        960,
        600,
        "The usual way: the endpoint runs a query, Pydantic reads a relation of each instance with "
        "a query of its own, N + 1 statements in all. With a returned query: the query and the "
        "response model make a plan, one statement, and the database builds the JSON.",
    )
    text, box, arrow = drawing.text, drawing.box, drawing.arrow

    text(
        30, 40, "The usual way: the endpoint runs the query, and validation asks for more", "title"
    )
    box(30, 62, 100, 66, "grey", "request")
    box(180, 62, 180, 66, "grey", "endpoint", "`list(User.select())`")
    box(410, 62, 190, 66, "grey", "Pydantic", "reads user.items,", "one user after the other")
    box(640, 62, 160, 66, "grey", "Pydantic objects", "dumped as JSON")
    box(840, 62, 90, 66, "grey", "bytes")
    for start, stop in ((130, 178), (360, 408), (600, 638), (800, 838)):
        arrow(f"{start},95 {stop},95")
    text(384, 88, "User", "soft middle")
    box(180, 212, 620, 44, "blue", "database")
    arrow("270,130 270,210", "thick")
    text(260, 168, "SELECT … FROM user", "code end")
    for x in range(424, 590, 20):
        arrow(f"{x},130 {x},210", "many")
    text(604, 162, "SELECT … FROM item WHERE owner_id = 1", "code")
    text(604, 182, "SELECT … FROM item WHERE owner_id = 2 …", "code")
    text(180, 284, "N + 1 statements for N users, and N + 1 waits for their answers", "red")

    text(30, 348, "The returned query: the response model says what to read", "title")
    box(30, 370, 100, 66, "grey", "request")
    box(180, 370, 180, 66, "grey", "endpoint", "`return User.select()`")
    box(410, 370, 190, 66, "green", "plan", "query + response model,", "made once")
    box(640, 370, 160, 66, "green", "texts", "a JSON text a row,", "joined by commas")
    box(840, 370, 90, 66, "grey", "bytes")
    for start, stop in ((130, 178), (360, 408), (800, 838)):
        arrow(f"{start},403 {stop},403")
    box(
        180,
        520,
        620,
        44,
        "blue",
        "database: reads the rows and their relations, and builds the JSON",
    )
    arrow("500,438 500,518", "thick")
    arrow("715,518 715,438", "thick")
    text(485, 484, "one statement", "name end")
    return drawing


def which_plan() -> Drawing:
    drawing = Drawing(
        960,
        640,
        "Which plan is taken: instances, if the type is no model or the query no plain one, or if "
        "a field is no column, relation or selected expression; rows, if something is left to "
        "check or to print in Python; else json.",
    )
    text, box, arrow = drawing.text, drawing.box, drawing.arrow
    left, width, right = 30, 360, 600

    box(left + 80, 24, 200, 40, "grey", "query + response type")
    arrow("210,64 210,94")
    box(
        *(left, 96, width, 84, "amber", "A plain query, a type made of a model?"),
        *("UserOut, UserOut | None, list[UserOut];", "a SELECT that gives instances"),
    )
    arrow("210,180 210,226")
    box(
        *(left, 228, width, 84, "amber", "Is each field there without an instance?"),
        *("a column, a relation,", "or what the query selects by that name"),
    )
    arrow("210,312 210,358")
    box(
        *(left, 360, width, 84, "amber", "Is nothing left for Python to do?"),
        *("each value is printed as Pydantic would print it,", "and nothing would check it"),
    )
    arrow("210,444 210,518")
    for y in (208, 340, 486):
        text(220, y, "yes", "name")

    statements = "1 statement + 1 for each relation"
    box(
        *(right, 148, 330, 112, "grey", "instances", "Peewee's objects, with the relations"),
        *("that the type has; Pydantic validates them", statements),
    )
    box(
        *(right, 346, 330, 112, "blue", "rows", "the columns that the type needs, as"),
        *("dictionaries; Pydantic validates them", statements),
    )
    box(
        *(left, 520, width, 92, "green", "json", "the database builds the JSON;"),
        *("nothing is validated", "1 statement"),
    )

    arrow(f"{left + width},138 494,138 494,190 {right - 2},190")
    arrow(f"{left + width},270 494,270 494,218 {right - 2},218")
    arrow(f"{left + width},402 {right - 2},402")
    for y in (131, 288, 395):
        text(400, y, "no", "name")
    text(428, 131, "int, dict, a union;", "soft")
    text(400, 158, "dicts(), raw()", "soft")
    text(428, 288, "a property, a path,", "soft")
    text(400, 306, "a validator of the model", "soft")
    text(428, 395, "a validator, a limit,", "soft")
    text(400, 421, "a computed field,", "soft")
    text(400, 439, "response_model_exclude_…", "soft")
    arrow(f"{left + width},566 765,566 765,460", "dashed")
    text(404, 557, "a value turns out that it can't print: read again", "soft")
    return drawing


def main() -> None:
    way_of_a_response().save("response.svg")
    which_plan().save("plans.svg")


if __name__ == "__main__":
    main()
