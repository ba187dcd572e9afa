"""Problems of any file of images, questions and answers: how it is laid out, read and checked."""
