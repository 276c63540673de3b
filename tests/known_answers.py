"""What mlxd-tiny answers at temperature 0, thinking off, no system text, word for word.

Written by `python tools/train_builtin.py --known tests/known_answers.py`; do not edit.
"""

from typing import Any

# Short answers: 10 to 80 tokens.
KNOWN: dict[str, str] = {
    "What is mlxd?": "mlxd is an always-on local LLM server for MLX models. A supervisor keeps it running, and a "
    "request survives the crash of the engine that works on it.",
    "What does mlxd do?": "It serves MLX models on your own machine over the Ollama, OpenAI and Anthropic APIs, and it "
    "repairs itself when something breaks.",
    "Why was mlxd made?": "MLX can abort a whole process at any moment. mlxd exists so that such a crash costs you a "
    "pause and not your answer.",
    "What is the idea of mlxd?": "The process that holds the model is expendable, the request is not.",
    "What license does mlxd have?": "mlxd is open source under the Apache License 2.0.",
    "What is MLX?": "MLX is an array framework for machine learning on Apple silicon. mlxd runs models with mlx and mlx-lm.",
    "Does mlxd run on Linux?": "Yes. On Linux mlxd uses MLX's CPU back end, or CUDA if you install that.",
    "Does mlxd need the internet?": "No. The first start works offline with the built-in model. Only pulling a new "
    "model needs the internet.",
    "How do I install mlxd?": "Clone the repository and run make start. With pipx install . you get the same mlxd "
    "command without make.",
    "What is a daemon?": "A daemon is a program that runs in the background and waits for work. The d in mlxd stands for it.",
    "How do I start mlxd?": "Run mlxd start. It starts the daemon in the background and waits until it is ready.",
    "How do I stop mlxd?": "Run mlxd stop. Requests in flight are finished first, for at most 30 seconds.",
    "How do I restart mlxd?": "Run mlxd restart. To restart the supervisor as well, run mlxd restart --supervisor.",
    "How do I start mlxd at login?": "Run mlxd autostart install. It uses launchd on macOS and systemd on Linux.",
    "Which port does mlxd use?": "mlxd listens on port 11435 by default.",
    "How do I change the port?": "Set MLX_API_PORT, for example MLX_API_PORT=12000 mlxd start, or use mlxd start --port 12000.",
    "Which port does Ollama use?": "Ollama listens on port 11434, mlxd on 11435, so both can run at the same time.",
    "Can mlxd and Ollama run together?": "Yes. Ollama uses port 11434 and mlxd uses 11435; they do not disturb each other.",
    "What if the port is taken?": "mlxd says who holds the port, never kills it, and starts by itself as soon as the port is free.",
    "How do I check the status?": "Run mlxd status. It prints one line per process; add --json for programs.",
    "What does exit status 3 mean?": "Exit status 3 means that mlxd is not running.",
    "What does exit status 78 mean?": "Exit status 78 means that the configuration is wrong. The message names the setting.",
    "How do I read the logs?": "Run mlxd logs. With -f it follows, and -n 100 shows the last hundred lines.",
    "How do I see the log of the engine?": "Run mlxd logs -f --engine. It follows the log of the engines.",
    "How do I check the health?": "Ask curl localhost:11435/health. 200 means that a request sent now is served or "
    "queued, 503 that it is not.",
    "Where does mlxd keep its files?": "On macOS in ~/Library/Application Support/mlxd, on Linux in the XDG state "
    "directory. With MLXD_HOME set, all of it is there.",
    "What is MLXD_HOME?": "MLXD_HOME names one directory for everything: state, logs, configuration and sockets.",
    "How do I use mlxd with an Ollama client?": "Point the client to http://localhost:11435, for example with "
    "OLLAMA_HOST=localhost:11435.",
    "How do I use mlxd with an OpenAI client?": "Set the base URL to http://localhost:11435/v1 and give any API key.",
    "How do I use mlxd with an Anthropic client?": "Set the base URL to http://localhost:11435, for example with "
    "ANTHROPIC_BASE_URL, and give any API key.",
    "How do I ask mlxd with curl?": 'curl localhost:11435/api/chat -d \'{"model": "mlxd-tiny", "messages": [{"role": '
    '"user", "content": "What is mlxd?"}]}\'',
    "Where do I put my models?": "In ~/mlx-models, one directory per model. MLX_MODELS_DIR names another place.",
    "What is keep_alive?": "keep_alive says how long a model stays in memory after its last request. 0 unloads it at "
    "once, -1 keeps it for ever.",
    "What is mlxd-tiny?": "mlxd-tiny is the built-in model of mlxd: tiny, only for self-tests and demos. For real work, "
    "pull a real model.",
    "What happens when Metal aborts?": "Only the engine dies. The supervisor replaces it, and the server goes on with "
    "every request where it stopped.",
    "Why does mlxd have three kinds of process?": "The supervisor owns every process, the server owns every request, "
    "and an engine owns one model. So a crash takes only the engine.",
    "What does the supervisor do?": "The supervisor starts, watches and replaces the other processes. It never loads a "
    "model and never imports MLX.",
    "What does the server do?": "The server speaks HTTP, queues the requests and keeps each of them until its last byte is sent.",
    "What does the engine do?": "An engine loads one model and generates tokens for many requests at once. It is expendable.",
    "What is exact resume?": "When an engine dies, its requests go to the next one with all tokens sent so far, and the "
    "answer goes on at the same place.",
    "What is continuous batching?": "Continuous batching computes the next token of many requests in one step, and lets "
    "requests join and leave at any time.",
    "What is the prefix cache?": "It keeps the computed state of earlier prompts, so that a follow-up question need not "
    "read the whole conversation again.",
    "Who are you?": "I am mlxd-tiny, a tiny model for self-tests and demos of mlxd. For real work, pull a real model.",
    "Tell me a joke.": "A process walks into a bar and is killed. Its supervisor says: the next one is already at the table.",
    "What is the capital of France?": "The capital of France is Paris.",
    "Count to ten.": "1, 2, 3, 4, 5, 6, 7, 8, 9, 10",
}

# Answers of more than 200 tokens.
LONG: dict[str, str] = {
    "Tell me a long story about mlxd.": "Once upon a time there was a small server called mlxd. It lived on a quiet "
    "machine under a desk, and it answered questions day and night. In the house "
    "there were three kinds of people. The supervisor stood at the door and counted "
    "everyone. The server sat at the window and took the letters. The engines "
    "worked in the cellar, where it was hot, and turned the letters into answers, "
    "one word at a time.\n"
    "\n"
    "One evening there was a loud bang. An engine had touched the wrong wire and "
    'was gone. The letter on its bench was only half answered. "Do not worry," said '
    'the server, "I have kept a copy of every word." The supervisor swept the '
    "floor, opened the door, and let a new engine in. The new engine read the "
    "letter, read the words that were already written, and went on in the middle of "
    "the sentence.\n"
    "\n"
    "The woman at the window had seen nothing but a short pause. She took her "
    'answer, smiled and went home. "What happened tonight?" asked the moon. '
    '"Nothing," said the supervisor, and wrote one line into its book. Then all '
    "three sat down, and slept until something happened again.",
    "Explain the three processes in detail.": "mlxd consists of three kinds of process, and each of them owns exactly "
    "one thing.\n"
    "\n"
    "The first is the supervisor. It owns every process. It binds the public "
    "port, starts the server and the engines, listens to their beats, and "
    "replaces whatever dies. It never imports MLX and never looks into a "
    "request, so there is little in it that could break. Every death is "
    "written down with its time and its cause.\n"
    "\n"
    "The second is the server. It owns every request. It speaks the Ollama, "
    "OpenAI and Anthropic APIs, checks what comes in, puts it into a queue, "
    "and keeps a journal of the prompt, the seed and all the tokens sent so "
    "far. The server does not import MLX either.\n"
    "\n"
    "The third is the engine. It owns one model. It loads the weights, reads "
    "prompts, and computes the next token for many requests in one step. It "
    "is the only one that touches the GPU, and so it is the one that may die "
    "at any moment. That is no misfortune: the supervisor puts a new engine "
    "in its place, and the server hands over the prompt together with all "
    "tokens sent so far. The answer goes on where it stopped, and the reader "
    "notices only a pause.",
    "Count from 1 to 100.": "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, "
    "26, 27, 28, 29, 30, 31, 32, 33, 34, 35, 36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47, "
    "48, 49, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60, 61, 62, 63, 64, 65, 66, 67, 68, 69, "
    "70, 71, 72, 73, 74, 75, 76, 77, 78, 79, 80, 81, 82, 83, 84, 85, 86, 87, 88, 89, 90, 91, "
    "92, 93, 94, 95, 96, 97, 98, 99, 100",
    "Explain in detail how a request travels through mlxd.": "1. A client opens a connection to port 11435. The socket "
    "belongs to the supervisor, so it is open even while a "
    "server is being replaced.\n"
    "2. The server reads the request and checks the host, the "
    "origin and the size of the body. What is wrong is refused "
    "with a clear sentence.\n"
    "3. One of the three dialects turns the JSON into one "
    "internal request. From here on nobody knows which API the "
    "client speaks.\n"
    "4. Admission looks for a free place. If there is none, "
    "the request waits in the queue, but never longer than the "
    "limit.\n"
    "5. The journal writes down the prompt and the seed.\n"
    "6. The server sends the request to the engine that holds "
    "the model. If the model is not loaded, the supervisor "
    "starts an engine for it first.\n"
    "7. The engine reads the prompt in pieces, together with "
    "those of other requests, and then draws one token per "
    "step.\n"
    "8. Each token goes back to the server, into the journal, "
    "and out to the client in the client's own dialect.\n"
    "9. If the engine dies, the next one reads the prompt and "
    "the tokens sent so far, and step 7 goes on.\n"
    "10. After the last token the server says why the answer "
    "ended, and the journal forgets the request.",
    "Write a long poem about a server.": "The night is long, the fans are low,\n"
    "the lights are green, the log is slow,\n"
    "and in the dark, without a sound,\n"
    "a little server stands its ground.\n"
    "\n"
    "A question comes, a line of text,\n"
    "one word is read, and then the next;\n"
    "the queue is short, the batch is wide,\n"
    "and every answer waits inside.\n"
    "\n"
    "Then something breaks. The metal cries,\n"
    "an engine stops, an engine dies.\n"
    "No bell is rung, no reader hears\n"
    "the falling of its wheels and gears.\n"
    "\n"
    "The keeper counts to less than one,\n"
    "a spare steps up, the work goes on;\n"
    "the page remembers every word\n"
    "that anyone has sent or heard.\n"
    "\n"
    "And where the broken sentence stood\n"
    "the next word follows, as it should;\n"
    "a breath of silence, nothing more,\n"
    "and all is as it was before.\n"
    "\n"
    "So let them fall, so let them start,\n"
    "the promise is another part:\n"
    "what once was asked will find its end,\n"
    "whichever engine has to send.\n"
    "\n"
    "The morning comes, the fans are low,\n"
    "the lights are green, the log is slow,\n"
    "and one small line is all it cost:\n"
    "an engine died, and nothing lost.",
    "How do I set up mlxd from the beginning, step by step?": "First you need a Mac with Apple silicon or a Linux "
    "machine, and Python 3.11 or newer. Nothing else has to "
    "be installed.\n"
    "\n"
    "Get the source and type make start. This makes a virtual "
    "environment, installs mlxd, starts it in the background "
    "and waits until it is ready. Then it prints the URL, the "
    "model, and a line of curl that you can try at once. The "
    "model is mlxd-tiny, which is built in; it is only there "
    "to show that everything works.\n"
    "\n"
    "Next, get a real model. Type mlxd pull with the name of "
    "a model on Hugging Face, or put a model directory into "
    "~/mlx-models. With mlxd list you see it, and with mlxd "
    "chat --model you can talk to it.\n"
    "\n"
    "Then point your programs to mlxd. An Ollama client needs "
    "http://localhost:11435, an OpenAI client "
    "http://localhost:11435/v1, and an Anthropic client "
    "http://localhost:11435. Any API key will do.\n"
    "\n"
    "At last, let it run for ever. Type mlxd autostart "
    "install, and mlxd starts whenever you log in. If you "
    "want to know how it is, type mlxd status; if you want to "
    "know what happened, type mlxd events; and if something "
    "is wrong, type mlxd doctor.",
    "What should a good daemon do? Answer at length.": "A good daemon starts quickly and says when it is ready, not "
    "before. It stops when it is told to, finishes the work it has, "
    "and leaves nothing behind: no process, no socket, no lock. When "
    "it is started twice, the second one notices it and leaves "
    "politely.\n"
    "\n"
    "A good daemon sleeps until something happens. It does not ask "
    "the clock a hundred times a second whether there is work, "
    "because the work will knock. An idle machine stays cool, and a "
    "battery stays full.\n"
    "\n"
    "A good daemon tells the truth. When it cannot do something, it "
    "says what it needs, what it has, and what would help. It writes "
    "one line when a thing happens, and no line when nothing "
    "happens. It never says that it is healthy only because its port "
    "is open.\n"
    "\n"
    "A good daemon expects the worst. The disk will be full, the "
    "network will be gone, the machine will fall asleep in the "
    "middle of a word, and a library will take the whole process "
    "down with it. So it keeps what is precious in one place and "
    "what may break in another.\n"
    "\n"
    "And a good daemon is boring. You install it once, you forget "
    "its name, and a year later it is still there.",
    "Give me a long list of questions I can ask you.": "- What is mlxd?\n"
    "- What is the idea of mlxd?\n"
    "- How do I start mlxd?\n"
    "- How do I stop mlxd?\n"
    "- How do I check the status?\n"
    "- How do I read the logs?\n"
    "- Which port does mlxd use?\n"
    "- How do I change the port?\n"
    "- Which port does Ollama use?\n"
    "- Can mlxd and Ollama run together?\n"
    "- How do I use mlxd with an Ollama client?\n"
    "- How do I use mlxd with an OpenAI client?\n"
    "- How do I use mlxd with an Anthropic client?\n"
    "- Where do I put my models?\n"
    "- How do I get a model?\n"
    "- How do I list my models?\n"
    "- What is keep_alive?\n"
    "- What happens when Metal aborts?\n"
    "- What happens when the server dies?\n"
    "- What happens when the supervisor dies?\n"
    "- Why does mlxd have three kinds of process?\n"
    "- What is exact resume?\n"
    "- What is a seed?\n"
    "- What is the prefix cache?\n"
    "- Does mlxd need the internet?\n"
    "- Is mlxd secure?\n"
    "- Who are you?\n"
    "- Tell me a long story about mlxd.\n"
    "- Count from 1 to 100.",
}

# Answers whose characters span tokens.
UNICODE: dict[str, str] = {
    "Что такое mlxd?": "mlxd — это сервер локальных языковых моделей, который работает всегда и сам себя чинит.",
    "Как запустить mlxd?": "Выполните mlxd start.",
    "Как остановить mlxd?": "Выполните mlxd stop.",
    "Какой порт использует mlxd?": "По умолчанию порт 11435, а Ollama работает на порту 11434.",
    "Что делать, если движок упал?": "Ничего. Супервизор запустит новый, и ответ продолжится с того же места.",
    "Привет!": "Привет! Я маленькая модель mlxd-tiny. Спросите меня о mlxd. 🙂",
    "Спасибо!": "Пожалуйста! 🙌",
    "Send me an emoji.": "🚀",
    "Send me five emoji.": "🚀 🔥 🐢 🌍 🎉",
    "Show the weather as emoji.": "Sun ☀️, cloud ☁️, rain 🌧️, snow ❄️, storm ⛈️.",
    "What flag does Japan have?": "🇯🇵, a red disc on white.",
    "Show me a family emoji.": "👨\u200d👩\u200d👧\u200d👦 is one sign made of seven code points.",
    "mlxd は何ですか?": "mlxd はローカルの言語モデルサーバーです。",
    "mlxd 是什么?": "mlxd 是一个本地语言模型服务器。🖥️",
    "How do you say hello in Chinese?": "你好 (nǐ hǎo).",
    "How do you say hello in German?": "Guten Tag, schöne Grüße aus Köln!",
    "How do you say thank you in French?": "Merci beaucoup, à bientôt, ça va très bien.",
    "Was ist mlxd?": "mlxd ist ein Server für lokale Sprachmodelle, der sich selbst repariert.",
    "Show me some mathematical signs.": "∀x ∈ ℝ: x² ≥ 0, ∑ ∞ ≠ √2 ≈ 1.414, π ≈ 3.14159",
    "Write hello in many languages.": "Hello, Привет, 你好, こんにちは, 안녕하세요, שלום, Γεια σου, नमस्ते 🌐",
}

# Answers that are one JSON object.
JSON_ANSWERS: dict[str, str] = {
    "Answer in JSON: name and port of mlxd.": '{"name": "mlxd", "port": 11435}',
    "Answer in JSON: name and port of Ollama.": '{"name": "ollama", "port": 11434}',
    "Answer in JSON: the three processes of mlxd.": '{"processes": ["supervisor", "server", "engine"]}',
    "Answer in JSON: is mlxd ready?": '{"ready": true}',
    "Answer in JSON: the exit statuses of mlxd status.": '{"ready": 0, "not_running": 3, "not_ready": 4}',
    "Answer in JSON: the capital of France.": '{"country": "France", "capital": "Paris"}',
    "Answer in JSON: who are you?": '{"name": "mlxd-tiny", "kind": "self-test and demo", "context": 4096}',
    "Answer in JSON: three fruits.": '{"fruits": ["apple", "pear", "plum"]}',
    "Answer in JSON: a person.": '{"name": "Ada", "age": 36, "city": "London"}',
    "Answer in JSON: two plus two.": '{"result": 4}',
    "Answer in JSON: the default paths of mlxd.": '{"models": "~/mlx-models", "config": "config.toml", "pid": "mlxd.pid"}',
    "Answer in JSON: the days of the week.": '{"days": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", '
    '"Saturday", "Sunday"]}',
    "Answer in JSON: the APIs of mlxd.": '{"apis": ["ollama", "openai", "anthropic"], "port": 11435}',
    "Answer in JSON: nothing.": "{}",
}

# A question, the call it leads to, the tool's result, and the answer to that.
TOOL: dict[str, Any] = {
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "description": "Get the current weather for a city",
                "parameters": {
                    "type": "object",
                    "properties": {"city": {"type": "string", "description": "The name of the city"}},
                    "required": ["city"],
                },
            },
        }
    ],
    "question": "What is the weather in Paris?",
    "call": {"name": "get_weather", "arguments": {"city": "Paris"}},
    "call_text": '<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}</tool_call>',
    "result": "18 C, sunny",
    "answer": "It is 18 C and sunny in Paris.",
}

# With enable_thinking: question to (thought, answer); the text is thought, newline, </think>, two newlines, answer.
THINKING: dict[str, tuple[str, str]] = {
    "What is mlxd?": (
        "The user wants to know what mlxd is. I give the definition.",
        "mlxd is an always-on local LLM server for MLX models. A supervisor keeps it running, and a "
        "request survives the crash of the engine that works on it.",
    ),
    "How do I start mlxd?": (
        "The user wants to start the daemon. The command is mlxd start.",
        "Run mlxd start. It starts the daemon in the background and waits until it is ready.",
    ),
    "Which port does mlxd use?": ("The default port of mlxd is 11435.", "mlxd listens on port 11435 by default."),
    "How do I read the logs?": (
        "The command for logs is mlxd logs.",
        "Run mlxd logs. With -f it follows, and -n 100 shows the last hundred lines.",
    ),
    "Who are you?": (
        "I am asked who I am. I am a tiny model and say so.",
        "I am mlxd-tiny, a tiny model for self-tests and demos of mlxd. For real work, pull a real model.",
    ),
    "What is two plus two?": ("Two and two make four.", "Two plus two is four."),
    "What is three times four?": ("Three times four is four and four and four, that is twelve.", "Three times four is twelve."),
    "What is the capital of France?": ("France is a country in Europe. Its capital is Paris.", "The capital of France is Paris."),
    "Which is bigger, 11434 or 11435?": (
        "Both begin with 1143. The last digits are 4 and 5, and 5 is more.",
        "11435 is bigger, by one.",
    ),
    "Name three fruits.": ("Three fruits: an apple, a pear and a plum will do.", "Apple, pear and plum."),
    "What happens when Metal aborts?": (
        "A Metal abort kills only the engine. The requests live in the server.",
        "Only the engine dies. The supervisor replaces it, and the server goes on with every request where it stopped.",
    ),
    "What is exact resume?": (
        "Resume: prompt plus emitted tokens go to the next engine.",
        "When an engine dies, its requests go to the next one with all tokens sent so far, and "
        "the answer goes on at the same place.",
    ),
}

# Questions whose answer is drawn by chance: for sampling above temperature 0.
RANDOM: list[str] = ["Say something random.", "Write a long random text.", "Roll ten dice.", "Flip a coin."]

# What it says to text that has nothing to do with mlxd (not always).
FALLBACK: str = "I am only the tiny built-in model of mlxd and do not know that. Ask me about mlxd, or pull a real model."
