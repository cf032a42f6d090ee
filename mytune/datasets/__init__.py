"""Data: rows from files or the hub, formats, the token cache, packing, batches."""

from mytune._lazy import lazy_names

_WHERE = {
    "AlpacaToMessages": "formats",
    "Batch": "loader",
    "BatchLoader": "loader",
    "ChatMLTemplate": "formats",
    "ConcatDataset": "packing",
    "Dataset": "tokens",
    "GrammarErrorCorrectionTemplate": "formats",
    "InputOutputToMessages": "formats",
    "Message": "formats",
    "OpenAIToMessages": "formats",
    "PackedDataset": "packing",
    "PromptTemplate": "formats",
    "QuestionAnswerTemplate": "formats",
    "Sample": "tokens",
    "ShareGPTToMessages": "formats",
    "Stats": "tokens",
    "SummarizeTemplate": "formats",
    "TokenDataset": "tokens",
    "alpaca_cleaned_dataset": "builders",
    "alpaca_dataset": "builders",
    "chat_dataset": "builders",
    "cnn_dailymail_articles_dataset": "builders",
    "collate": "loader",
    "count_targets": "loader",
    "grammar_dataset": "builders",
    "instruct_dataset": "builders",
    "open_source": "sources",
    "samsum_dataset": "builders",
    "sft_dataset": "builders",
    "slimorca_dataset": "builders",
    "text_completion_dataset": "builders",
    "validate_messages": "formats",
    "wikitext_dataset": "builders",
}
__all__ = list(_WHERE)
__getattr__ = lazy_names(__name__, _WHERE)
