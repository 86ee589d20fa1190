"""A resources server of NeMo Gym without a network: the share of a word's letters that were said, less for hints."""

from fastapi import FastAPI, Request
from nemo_gym.base_resources_server import (
    BaseResourcesServerConfig,
    BaseVerifyRequest,
    BaseVerifyResponse,
    SimpleResourcesServer,
)
from nemo_gym.server_utils import SESSION_ID_KEY
from pydantic import Field


class VerifyRequest(BaseVerifyRequest):
    word: str


class VerifyResponse(BaseVerifyResponse):
    hints: int


class Words(SimpleResourcesServer):
    config: BaseResourcesServerConfig
    hints: dict[str, int] = Field(default_factory=dict)

    def setup_webserver(self) -> FastAPI:
        app = super().setup_webserver()
        app.post("/hint")(self.hint)
        return app

    async def hint(self, request: Request) -> dict:
        session = request.session[SESSION_ID_KEY]
        self.hints[session] = self.hints.get(session, 0) + 1
        return {"hint": self.hints[session]}

    async def verify(self, request: Request, body: VerifyRequest) -> VerifyResponse:
        said = "".join(part.text for item in body.response.output if item.type == "message" for part in item.content)
        hints = self.hints.pop(request.session[SESSION_ID_KEY], 0)
        reward = sum(letter in said for letter in body.word) / len(body.word) - 0.3 * hints
        return VerifyResponse(**body.model_dump(), reward=reward, hints=hints)


if __name__ == "__main__":
    Words.run_webserver()
