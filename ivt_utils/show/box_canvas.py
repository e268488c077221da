"""The anywidgets: a picture on which a reader draws a box (`box_canvas.js`), and a guard of the keyboard."""

import base64
import io
from functools import cache
from pathlib import Path

from ivt_utils.overlay import COLORS

CSS = """
.ivt-canvas { max-width: 400px; width: 100%; }
.ivt-canvas canvas { display: block; max-width: 100%; touch-action: none; cursor: crosshair; }
.ivt-canvas canvas:focus-visible, .ivt-canvas-submit:focus-visible { outline: 3px solid #0072B2; outline-offset: -3px; }
.ivt-canvas p { margin: 6px 0; line-height: 1.4; font-size: 14px; color: var(--jp-ui-font-color1, inherit); }
.ivt-canvas-status { font-weight: 600; min-height: 1.4em; }
.ivt-canvas-submit { font-size: 14px; min-height: 40px; padding: 6px 16px; cursor: pointer; }
"""

PANEL = "ivt-panel"
# JupyterLab's shortcuts would take the arrow keys and Enter away from a list, a button or the canvas in an output; it
# looks up none for an element with this attribute.
KEEP_KEYS = f"""
const keep = ({{ target }}) => target.setAttribute("data-lm-suppress-shortcuts", "true");
function render({{ el }}) {{
  const panel = el.closest(".{PANEL}");
  if (panel) {{
    panel.addEventListener("focusin", keep);
    for (const said of panel.querySelectorAll(".widget-html")) said.setAttribute("aria-live", "polite");
  }}
  else requestAnimationFrame(() => render({{ el }}));
}}
export default {{ render }};
"""


@cache
def canvas_class():
    """Return the widget's class: `box` and `truth` are [] or four integers 0..1000; `submits` counts submissions."""
    import anywidget
    import traitlets

    class BoxCanvas(anywidget.AnyWidget):
        _esm = Path(__file__).with_name("box_canvas.js")
        _css = CSS
        image = traitlets.Unicode().tag(sync=True)  # a data URL
        label = traitlets.Unicode().tag(sync=True)  # the referring expression
        box = traitlets.List().tag(sync=True)
        truth = traitlets.List().tag(sync=True)  # drawn when it is there
        grid = traitlets.Int(1).tag(sync=True)  # the step of the coordinates
        submits = traitlets.Int(0).tag(sync=True)
        busy = traitlets.Bool(False).tag(sync=True)  # no drawing while the student answers
        status = traitlets.Unicode().tag(sync=True)  # read out to a screen reader
        box_color = traitlets.Unicode(COLORS["answer"]).tag(sync=True)
        truth_color = traitlets.Unicode(COLORS["truth"]).tag(sync=True)

    return BoxCanvas


def panel(children):
    """Return a column of widgets, as wide as there is room, that keeps its keys from the notebook around it."""
    import anywidget
    import ipywidgets

    guard = anywidget.AnyWidget(_esm=KEEP_KEYS, layout={"display": "none"})
    column = ipywidgets.VBox([*children, guard], layout={"max_width": "720px", "width": "100%"})
    return column.add_class(PANEL)


def data_url(picture) -> str:
    """Return a PIL image or the bytes of a PNG as a data URL."""
    if not isinstance(picture, bytes):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        picture = buffer.getvalue()
    return "data:image/png;base64," + base64.b64encode(picture).decode()
