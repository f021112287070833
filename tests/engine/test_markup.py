from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure

from fastcil.engine.markup import Html, definitions, details, image, plot, table, tag


def draw(label="a <b> & 'c'"):
    figure = Figure()
    axes = figure.subplots()
    axes.plot([0, 1], [1, 0], marker="o")
    axes.set_title(label)
    return figure


def test_everything_but_html_is_escaped():
    assert tag("p", "<i>", Html("<b>x</b>")) == "<p>&lt;i&gt;<b>x</b></p>"
    assert tag("a", "x", href='"><script>') == '<a href="&quot;&gt;&lt;script&gt;">x</a>'
    assert "<x>" not in table(["<x>"], [["<x>", 1.5]]) + definitions({"<x>": "<x>"})
    assert details("s", "c", shown=True) == '<details open=""><summary>s</summary>c</details>'


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("data:image/png;base64,AAAA", True),
        ("data:image/jpeg;base64,AAAA", True),
        ("https://example.org/a.png", False),
        ("data:text/html;base64,AAAA", False),
        ("//example.org/a.png", False),
    ],
)
def test_pictures_come_from_the_page_itself(source, shown):
    made = image(source, "a <picture>")
    assert (source in made) == shown
    assert "a &lt;picture&gt;" in made


def test_a_plot_is_one_svg_element_with_nothing_foreign():
    made = plot(draw(), "what <it> shows", "heading")
    root = ElementTree.fromstring(made)
    svg = root.find("svg")
    assert svg.get("aria-label") == "what <it> shows"
    assert "a <b> & 'c'" in [element.text for element in svg.iter("text")]
    assert root.find("figcaption").text == "heading"
    assert not re.search(r"https?:|xmlns|<style|<metadata|font-family", made)


def test_references_inside_a_plot_lead_to_its_own_ids():
    ids, references = [], []
    for name in ("one", "two"):
        root = ElementTree.fromstring(plot(draw(), name))
        for element in root.iter():
            ids += [element.get("id")] if element.get("id") else []
            for value in element.attrib.values():
                references += re.findall(r"^#(.*)$|^url\(#(.*)\)$", value)
    assert references
    assert {a or b for a, b in references} == set(ids)
    assert len(set(ids)) == len(ids)


def test_the_same_plot_is_the_same_text():
    assert plot(draw(), "x") == plot(draw(), "x")
