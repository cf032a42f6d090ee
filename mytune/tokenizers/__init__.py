"""Text and conversations to token ids, and back; prompt templates."""

from mytune._lazy import lazy_names

__all__, __getattr__ = lazy_names(
    __name__,
    {
        "base": "ModelTokenizer StreamDecoder check_vocabulary",
        "llama3": "Llama3Tokenizer llama3_tokenizer",
        "messages": "Message Role validate_messages",
        "templates": (
            "ChatMLTemplate GrammarErrorCorrectionTemplate PromptTemplate QuestionAnswerTemplate "
            "SummarizeTemplate"
        ),
    },
)
