"""Evaluation with EleutherAI's harness: tasks, the adapter that it drives, results."""

from mytune._lazy import lazy_names

__all__, __getattr__ = lazy_names(
    __name__,
    {
        "adapter": "HarnessModel",
        "answers": "KeptAnswers",
        "batches": "check_batch_size",
        "tasks": "check_limit check_lm_eval check_tasks load_tasks",
        "chat_template": "ChatTemplate read_chat_template",
        "harness": "evaluate evaluate_scores",
        "results": (
            "check_output compare_results differing read_results results_table write_results"
        ),
        "scoring": "Request score",
    },
)
