"""Operations on arrays, in pure pairs x_forward / x_backward, one file a family."""
