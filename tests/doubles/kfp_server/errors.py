"""Refusals as grpc-gateway writes them."""


class ApiError(Exception):
    """`status` is HTTP's, `code` is gRPC's."""

    def __init__(self, status: int, code: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": message, "code": code, "message": message, "details": []}


def invalid(message: str) -> ApiError:
    return ApiError(400, 3, f"Invalid input error: {message}")


def missing(what: str, key: str) -> ApiError:
    return ApiError(404, 5, f"ResourceNotFoundError: {what} {key} not found.")


def exists(message: str) -> ApiError:
    return ApiError(409, 6, f"Already exist error: {message}")
