from pathlib import Path

from benchmarks import clients, tables

PAGE = Path(__file__).parents[2] / clients.PAGE


def test_the_page_on_programs_says_what_releases_say():
    assert tables.read(PAGE) == clients.text(), "run python -m benchmarks.clients"


def test_latent_consistency_is_exact_in_comfyui_with_simple_and_near_in_a1111_18():
    text = clients.text()
    assert "| ComfyUI | ComfyUI a125cd84 (2026-11) | exact | exact | exact | exact |" in text
    assert "| A1111 1.8 | A1111 1.8-dev, Forge dfdcbab6 | exact | near: 999, 19 | near: 999, 679, 339, 19 |" in text
