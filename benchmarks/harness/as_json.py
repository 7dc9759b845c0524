"""How result files are written: so that a change of one entry is a change of one line."""

import json


def as_json(content: dict) -> str:
    """Strict JSON, an entry of a list on each line."""

    def dump(value) -> str:
        if isinstance(value, list) and value:
            return "[\n" + ",\n".join(json.dumps(entry, allow_nan=False) for entry in value) + "\n]"
        return json.dumps(value, allow_nan=False)

    return "{\n" + ",\n".join(f"{json.dumps(key)}: {dump(value)}" for key, value in content.items()) + "\n}\n"
