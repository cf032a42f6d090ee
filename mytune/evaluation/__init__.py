"""Evaluation with EleutherAI's harness: tasks, the adapter that it drives, results."""

from mytune._lazy import lazy_names

_WHERE = {
    "HarnessModel": "adapter",
    "check_batch_size": "batches",
    "check_limit": "tasks",
    "ChatTemplate": "chat_template",
    "read_chat_template": "chat_template",
    "evaluate": "harness",
    "evaluate_scores": "harness",
    "check_output": "results",
    "compare_results": "results",
    "differing": "results",
    "read_results": "results",
    "results_table": "results",
    "write_results": "results",
    "Request": "scoring",
    "score": "scoring",
    "check_lm_eval": "tasks",
    "check_tasks": "tasks",
    "load_tasks": "tasks",
    "refuse_generation": "tasks",
}
__all__ = list(_WHERE)
__getattr__ = lazy_names(__name__, _WHERE)
