"""The models that MODEL=auto selects in this repository."""

from datetime import date


def test_the_default_models_are_alive(main):
    """In LiteLLM's own map, and not past their deprecation date."""
    known = main.litellm.model_cost
    for name in {*main.DEFAULT_MODELS} - {"mock"}:
        model = main.litellm_name(name, "auto")
        entry = known.get(model) or known[model.partition("/")[2]]
        assert entry["litellm_provider"] == name and entry.get("supports_system_messages", True)
        assert entry.get("deprecation_date", "9999") > date.today().isoformat()
