"""The official `bfcl` command with this project's prompt and format; needs the full bfcl-eval package.

    python -m evals.bfcl_handler MODEL generate --test-category single_turn,multi_turn --backend vllm
    python -m evals.bfcl_handler MODEL evaluate --test-category single_turn,multi_turn

MODEL, a folder or hub id, is registered for this one run. Folders result/ and score/ appear in
BFCL_PROJECT_ROOT.
"""

import os
import sys

try:
    from bfcl_eval.constants.model_config import MODEL_CONFIG_MAPPING, ModelConfig
    from bfcl_eval.model_handler.local_inference.base_oss_handler import OSSHandler
    from overrides import override
except ImportError as error:
    sys.exit(f"evals.bfcl_handler: error: {error}; pip install bfcl-eval soundfile, with all they need")

from evals.bfcl_check import decode
from evals.bfcl_multi_turn import call_text, is_plain, read_calls
from prompts import render_prompt


class ToolN1Handler(OSSHandler):
    """Asks as `eval_bfcl.py generate` does, and decodes as `eval_bfcl.py score` does."""

    def __init__(self, model_name, temperature, registry_name, is_fc_model, **kwargs) -> None:
        super().__init__(model_name, temperature, registry_name, is_fc_model, **kwargs)
        self.skip_special_tokens = False  # in some vocabularies <tool_call> is a special token

    @override
    def _pre_query_processing_prompting(self, test_entry: dict) -> dict:
        return {"message": [], "function": test_entry["function"]}  # without the package's own system prompt

    @override
    def _format_prompt(self, messages, function) -> str:
        return render_prompt(self.tokenizer, messages, function)

    @override
    def decode_ast(self, result, language, has_tool_call_tag):
        """[{name: arguments}]. Raises ValueError where there is none: officially that is no call."""
        if (calls := decode(result)) is None:
            raise ValueError("no closed tool-call section with a JSON list of calls")
        return calls

    @override
    def decode_execute(self, result, has_tool_call_tag):
        """The calls as the text that the package evaluates. Raises ValueError where there is none."""
        calls = read_calls(result)
        if calls is None or not all(is_plain(call) for call in calls):
            raise ValueError("no closed tool-call section with a JSON list of plain calls")
        return [call_text(call) for call in calls]


def main(model: str, command: str, *options: str) -> None:
    """Registers `model` and hands `command` (generate or evaluate) to the official command line."""
    from bfcl_eval.__main__ import cli

    # The official runner reads "_" in a folder's name as "/", so the name must have no "_" of its own.
    name = "Tool-N1/" + os.path.basename(model.rstrip("/")).replace("_", "-")
    MODEL_CONFIG_MAPPING[name] = ModelConfig(
        model_name=model, display_name=name, url="", org="", license="", model_handler=ToolN1Handler,
        input_price=None, output_price=None, is_fc_model=False, underscore_to_dot=False,
    )
    local = ["--local-model-path", model] if command == "generate" and os.path.isdir(model) else []
    cli([command, "--model", name, *local, *options])


if __name__ == "__main__":
    main(*sys.argv[1:])
