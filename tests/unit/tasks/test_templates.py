"""Fields that templates use and print."""

from __future__ import annotations

from a2sf.tasks.templates import fields_used, null_fields


def test_fields_that_templates_use():
    task = {"doc_to_text": "{% if more %}{{more}}{% endif %}{{goal}}", "doc_to_choice": "{{[sol1, sol2]}}"}
    assert fields_used(task | {"doc_to_target": "label"}) == {"more", "goal", "sol1", "sol2"}
    assert fields_used({"doc_to_text": "{{goal"}) == set()
    assert fields_used(task | {"process_docs": len}) == set()  # it may make the fields


def test_null_is_named_only_where_every_document_prints_it():
    document = {"goal": None, "more": None, "word": "so", "none": None}
    assert null_fields(["{% if more %}{{more}}{% endif %}{{goal}} {{word}} {{other}}"], document) == ["goal"]
    assert null_fields(["none", None, len], document) == ["none"]
    assert null_fields(["{{goal}}"], "text") == []
