// OpenAI's client for Node: an answer streamed at two depths, its reasoning apart, and the loops that its tokens ran.
//
//     melt-serve serve                  # in another terminal
//     cd examples/node && npm ci && node chat.mjs
import OpenAI from "openai";

const client = new OpenAI({
  baseURL: process.env.OPENAI_BASE_URL ?? "http://localhost:8000/v1",
  apiKey: process.env.OPENAI_API_KEY ?? "none",
});
const [model] = (await client.models.list()).data;
const question = "Find everybody. Ann is in Rome. Bob is with Ann. Eve is in Oslo. Kim is with Bob. Where is Kim?";
console.log(question);

for (const loops of [2, 4]) {
  const stream = await client.chat.completions.create({
    model: model.id,
    messages: [{ role: "user", content: question }],
    temperature: 0,
    stream: true,
    stream_options: { include_usage: true },
    vllm_xargs: { loops }, // fields that OpenAI does not know are passed on as they are
  });
  let reasoning = "", answer = "", usage;
  for await (const chunk of stream) {
    const delta = chunk.choices[0]?.delta;
    reasoning += delta?.reasoning ?? "";
    answer += delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  console.log(`loops ${usage.loops.mean}, ${usage.completion_tokens} tokens: (${reasoning}) ${answer}`);
}
