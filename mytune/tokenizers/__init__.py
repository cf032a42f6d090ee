"""Text and conversations to token ids, and back; prompt templates."""

from mytune.tokenizers.base import ModelTokenizer, StreamDecoder, check_vocabulary
from mytune.tokenizers.llama3 import Llama3Tokenizer, llama3_tokenizer
from mytune.tokenizers.messages import Message, Role, validate_messages
from mytune.tokenizers.templates import (
    ChatMLTemplate,
    GrammarErrorCorrectionTemplate,
    PromptTemplate,
    QuestionAnswerTemplate,
    SummarizeTemplate,
)

__all__ = [
    "ChatMLTemplate",
    "GrammarErrorCorrectionTemplate",
    "Llama3Tokenizer",
    "Message",
    "ModelTokenizer",
    "PromptTemplate",
    "QuestionAnswerTemplate",
    "Role",
    "StreamDecoder",
    "SummarizeTemplate",
    "check_vocabulary",
    "llama3_tokenizer",
    "validate_messages",
]
