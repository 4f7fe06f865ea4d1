"""What Prometheus reads of our metrics, by its own client."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from lcmlora.flows.monitoring.exporter import Exporter

Samples = dict[str, dict[tuple[str, ...], float]]


def samples(made: Exporter | CollectorRegistry) -> Samples:
    """Returns what a scrape reads: by name, then by the labels' values in the order of their names."""
    registry = made if isinstance(made, CollectorRegistry) else made.registry
    found: Samples = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            labels = tuple(value for _, value in sorted(sample.labels.items()))
            assert labels not in found.setdefault(sample.name, {}), "Prometheus refuses a sample that is there twice"
            found[sample.name][labels] = sample.value
    return found
