"""Data: rows from files or the hub, formats, the token cache, packing, batches."""

from mytune._lazy import lazy_names

__all__, __getattr__ = lazy_names(
    __name__,
    {
        "formats": "AlpacaToMessages InputOutputToMessages OpenAIToMessages ShareGPTToMessages",
        "loader": "Batch BatchLoader collate count_targets",
        ".tokenizers.templates": (
            "ChatMLTemplate GrammarErrorCorrectionTemplate PromptTemplate "
            "QuestionAnswerTemplate SummarizeTemplate"
        ),
        "packing": "ConcatDataset PackedDataset",
        "row_format": "RowFormat find_row_format",
        "tokens": "Dataset Sample Stats TokenDataset",
        ".tokenizers.messages": "Message validate_messages",
        "builders": (
            "alpaca_cleaned_dataset alpaca_dataset chat_dataset cnn_dailymail_articles_dataset "
            "grammar_dataset instruct_dataset samsum_dataset sft_dataset slimorca_dataset "
            "text_completion_dataset wikitext_dataset"
        ),
        "sources": "open_source",
    },
)
