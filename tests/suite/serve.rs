//! `eqim-serve`: the images of `eqim-run`, errors in OpenAI's envelope, load, and the end of the service.

use std::io::{BufRead, BufReader};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};

use crate::common::bins::{Workplace, program};
use crate::common::{Fixture, fixtures};

/// Longer than anything takes here.
const PATIENCE: Duration = Duration::from_secs(60);

/// A running service, which is ended with its test.
struct Service {
    child: Child,
    _output: BufReader<ChildStdout>,
    url: String,
    client: ureq::Agent,
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Status and body of a response.
type Answer = (u16, Value);

impl Service {
    fn start(place: &Workplace, flags: &str) -> Self {
        let mut command = Command::new(program("eqim-serve"));
        command.args("--engine bundle --port 0 --backend candle".split(' ')).args(flags.split_whitespace());
        let log = std::fs::File::create(place.path("log.txt")).unwrap();
        command.env_remove("EQIM_API_KEY").current_dir(place.path("")).stdout(Stdio::piped()).stderr(log);
        let mut child = command.spawn().unwrap();
        let mut output = BufReader::new(child.stdout.take().unwrap());
        let mut line = String::new();
        output.read_line(&mut line).unwrap();
        let url = line.trim().rsplit_once(" at ").unwrap_or_else(|| panic!("{line:?}")).1.to_string();
        let config = ureq::Agent::config_builder().http_status_as_error(false).timeout_global(Some(PATIENCE)).build();
        Self { child, _output: output, url, client: config.into() }
    }

    fn get(&self, path: &str) -> (u16, String) {
        let mut response = self.client.get(format!("{}{path}", self.url)).call().unwrap();
        (response.status().as_u16(), response.body_mut().read_to_string().unwrap())
    }

    fn post(&self, path: &str, body: &Value) -> Answer {
        let mut response = self.client.post(format!("{}{path}", self.url)).send_json(body).unwrap();
        (response.status().as_u16(), response.body_mut().with_config().limit(1 << 30).read_json().unwrap())
    }

    /// The size of an image of some tokens.
    fn size(&self, tokens: u64) -> String {
        let models: Value = serde_json::from_str(&self.get("/v1/models").1).unwrap();
        let number = |name: &str| models["data"][0][name].as_u64().unwrap();
        format!("{}x{}", tokens * number("token_width"), number("height"))
    }

    fn generate(&self, body: &Value) -> Answer {
        self.post("/v1/images/generations", body)
    }

    /// Sends a form with a picture.
    fn edit(&self, picture: &[u8], fields: &[(&str, &str)]) -> Answer {
        const BORDER: &str = "a-border-that-no-picture-has";
        let mut body = vec![];
        for (name, value) in fields {
            let field = format!("--{BORDER}\r\nContent-Disposition: form-data; name=\"{name}\"\r\n\r\n{value}\r\n");
            body.extend(field.into_bytes());
        }
        if !picture.is_empty() {
            let disposition = "Content-Disposition: form-data; name=\"image\"; filename=\"photo.png\"";
            body.extend(format!("--{BORDER}\r\n{disposition}\r\n\r\n").into_bytes());
            body.extend(picture);
            body.extend(b"\r\n");
        }
        body.extend(format!("--{BORDER}--\r\n").into_bytes());
        let request = self.client.post(format!("{}/v1/images/edits", self.url));
        let request = request.header("Content-Type", format!("multipart/form-data; boundary={BORDER}"));
        let mut response = request.send(&body[..]).unwrap();
        (response.status().as_u16(), response.body_mut().with_config().limit(1 << 30).read_json().unwrap())
    }

    /// The events of a stream: their names and data.
    fn stream(&self, body: &Value) -> impl Iterator<Item = (String, Value)> + use<> {
        let response = self.client.post(format!("{}/v1/images/generations", self.url)).send_json(body).unwrap();
        assert_eq!(response.status(), 200);
        let mut lines = BufReader::new(response.into_body().into_reader()).lines().map_while(Result::ok);
        std::iter::from_fn(move || {
            let name = lines.find_map(|line| line.strip_prefix("event: ").map(String::from))?;
            let data = lines.next()?;
            Some((name, serde_json::from_str(data.strip_prefix("data: ")?).unwrap()))
        })
    }

    /// The value of a metric.
    fn metric(&self, name: &str) -> f64 {
        let (status, text) = self.get("/metrics");
        assert_eq!(status, 200);
        let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name} in {text}"));
        line.rsplit_once(' ').unwrap().1.parse().unwrap()
    }

    /// Waits until a metric has a value.
    fn wait(&self, name: &str, value: f64) {
        let start = Instant::now();
        while self.metric(name) != value {
            assert!(start.elapsed() < PATIENCE, "{name} is {}, not {value}", self.metric(name));
            sleep(Duration::from_millis(5));
        }
    }

    fn terminate(&self) {
        let done = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status().unwrap();
        assert!(done.success());
    }

    fn ended(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            match self.child.try_wait().unwrap() {
                Some(status) => return status,
                None => assert!(start.elapsed() < PATIENCE, "the service does not end"),
            }
            sleep(Duration::from_millis(5));
        }
    }
}

fn file(image: &Value) -> Vec<u8> {
    STANDARD.decode(image["b64_json"].as_str().unwrap()).unwrap()
}

fn pixels(image: &Value) -> image::RgbImage {
    image::load_from_memory(&file(image)).unwrap().to_rgb8()
}

fn place() -> Workplace {
    Workplace::with_bundle(&Fixture::open(fixtures()))
}

#[test]
fn images_are_those_of_eqim_run() {
    let place = place();
    let service = Service::start(&place, "");
    assert_eq!(service.get("/health/ready").0, 200);
    for (body, flags) in [
        (json!({ "prompt": 1, "seed": 7, "num_inference_steps": 3 }), "--class 1 --seed 7 --steps 3"),
        (
            json!({ "prompt": "0:0-4,2:3-", "seed": 8, "guidance_scale": 2.5, "num_inference_steps": 2, "solver": "ab2" }),
            "--classes 0:0-4,2:3- --seed 8 --cfg 2.5 --steps 2 --solver ab2",
        ),
    ] {
        let (status, answer) = service.generate(&body);
        assert_eq!(status, 200, "{answer}");
        place.run(&format!("eqim-run --engine bundle --backend candle {flags} -o image.png")).succeeded();
        assert_eq!(file(&answer["data"][0]), place.read("image.png"), "{body}");
        assert_eq!(answer["data"][0]["seed"], body["seed"]);
    }
    // Several images have the seeds that follow.
    let body = json!({ "prompt": "none", "n": 3, "seed": 5, "num_inference_steps": 2 });
    let several = service.generate(&body).1;
    for (index, image) in several["data"].as_array().unwrap().iter().enumerate() {
        let seed = 5 + index;
        let alone = service.generate(&json!({ "prompt": "none", "seed": seed, "num_inference_steps": 2 })).1;
        assert_eq!(image["seed"], seed);
        let levels = pixels(image).iter().zip(pixels(&alone["data"][0]).iter()).map(|(a, b)| a.abs_diff(*b)).max();
        assert!(levels <= Some(1), "{levels:?}");
    }
    for format in ["png", "jpeg", "webp"] {
        let body = json!({ "prompt": 0, "seed": 1, "num_inference_steps": 1, "output_format": format });
        let image = &service.generate(&body).1["data"][0];
        let found = image::guess_format(&file(image)).unwrap();
        assert_eq!(found, image::ImageFormat::from_extension(format).unwrap());
    }
    let (_, models) = service.get("/v1/models");
    let models: Value = serde_json::from_str(&models).unwrap();
    assert_eq!((&models["data"][0]["id"], &models["data"][0]["precision"]), (&json!("bundle"), &json!("fp32")));
    service.wait("eqim_images_total{model=\"bundle\",outcome=\"done\"}", 11.0);
}

#[test]
fn pictures_are_continued_as_eqim_run_continues_them() {
    let place = place();
    let service = Service::start(&place, "");
    let colours = |x: u32, y: u32| image::Rgb([(3 * x) as u8, (5 * y) as u8, (x * y) as u8]);
    image::RgbImage::from_fn(77, 40, colours).save(place.path("photo.png")).unwrap();
    let photo = place.read("photo.png");
    let sampling = [("prompt", "1"), ("seed", "7"), ("num_inference_steps", "2")];
    let flags = "--class 1 --seed 7 --steps 2";
    for (fields, more) in [
        (vec![], "".to_string()),
        (vec![("direction", "left"), ("keep_prefix_pixels", "true")], " --direction left --keep-prefix-pixels".into()),
    ] {
        let (status, answer) = service.edit(&photo, &[&sampling[..], &fields[..]].concat());
        assert_eq!(status, 200, "{answer}");
        let image = &answer["data"][0];
        let width = image["size"].as_str().unwrap().split_once('x').unwrap().0;
        let line =
            format!("eqim-run --engine bundle --backend candle {flags} --prefix photo.png --width {width}{more}");
        place.run(&format!("{line} -o image.png")).succeeded();
        assert_eq!(file(image), place.read("image.png"), "{fields:?}");
    }
    let size = service.size(2);
    for (picture, fields, expected, param) in [
        (&photo[..], vec![("prompt", "1"), ("size", &size)], 400, "size"),
        (&photo[..40], vec![("prompt", "1")], 422, "image"),
        (b"GIF89a", vec![("prompt", "1")], 422, "image"),
        (b"", vec![("prompt", "1")], 400, "image"),
        (&photo[..], vec![("prompt", "1"), ("mask", "x")], 400, "mask"),
    ] {
        let (status, answer) = service.edit(picture, &fields);
        assert_eq!((status, &answer["error"]["param"]), (expected, &json!(param)), "{answer}");
    }
    let (status, answer) = service.edit(&photo, &[("prompt", "1"), ("direction", "up")]);
    assert_eq!((status, &answer["error"]["code"]), (400, &json!("invalid_form")), "{answer}");
    let (status, answer) = service.generate(&json!({ "prompt": 0, "direction": "left" }));
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("direction")), "{answer}");
    let (status, answer) = service.generate(&json!({ "prompt": 0, "keep_prefix_pixels": true }));
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("keep_prefix_pixels")), "{answer}");
}

#[test]
fn a_stream_brings_the_image_strip_by_strip() {
    let place = place();
    let service = Service::start(&place, "");
    for tokens in [40, 300] {
        let size = service.size(tokens);
        let body = json!({ "prompt": 1, "seed": 3, "size": size, "num_inference_steps": 1 });
        let streamed = json!({ "prompt": 1, "seed": 3, "size": size, "num_inference_steps": 1, "stream": true });
        let events: Vec<_> = service.stream(&streamed).collect();
        let (last, strips) = events.split_last().unwrap();
        assert!(strips.len() > 2 && last.0 == "image_generation.completed", "{tokens}: {} strips", strips.len());
        assert_eq!(file(&last.1), file(&service.generate(&body).1["data"][0]), "{tokens}");
        let (mut known, mut done) = (0, 0);
        for (index, (name, strip)) in strips.iter().enumerate() {
            assert_eq!(
                (name.as_str(), &strip["partial_image_index"]),
                ("image_generation.partial_image", &json!(index))
            );
            assert_eq!((&strip["type"], &strip["image_size"]), (&json!(name), &json!(size)));
            let (column, columns) = (strip["column"].as_u64().unwrap(), pixels(strip));
            let end = column + u64::from(columns.width());
            if strip["preview"] == true {
                assert!(done <= column && column <= known && end > known, "{column} to {end} of {known}");
                known = end;
            } else {
                assert_eq!(column, done);
                done = end;
            }
            assert!(size.ends_with(&format!("x{}", columns.height())), "{size}");
        }
        // What is decoded as a whole is the completed image. The strips of a longer image are final.
        let expected = if tokens > 256 { size.clone() } else { format!("0x{}", size.split_once('x').unwrap().1) };
        assert!(expected.starts_with(&format!("{done}x")), "{done} of {size}");
        assert!(known > 0 && strips.len() > 4, "{tokens}: {} strips", strips.len());
    }
    let body = json!({ "prompt": 1, "num_inference_steps": 1, "stream": true, "partial_images": 0 });
    assert_eq!(service.stream(&body).count(), 1);
    // Two images come side by side.
    let size = service.size(100);
    let body = json!({ "prompt": 1, "num_inference_steps": 1, "stream": true, "n": 2, "size": size });
    let events: Vec<_> = service.stream(&body).map(|(_, data)| data["id"].as_str().unwrap().to_string()).collect();
    let first = |id: &String| events.iter().position(|other| other == id).unwrap();
    let last = |id: &String| events.iter().rposition(|other| other == id).unwrap();
    let other = events.iter().find(|id| *id != &events[0]).unwrap();
    assert!(first(other) < last(&events[0]), "{events:?}");
}

#[test]
fn a_running_image_gets_another_class() {
    let place = place();
    let service = Service::start(&place, "");
    let wide = service.size(400);
    let body = json!({ "prompt": 0, "seed": 4, "size": wide, "num_inference_steps": 4, "stream": true });
    let mut events = service.stream(&body);
    let id = events.next().unwrap().1["id"].as_str().unwrap().to_string();
    let (status, amended) = service.post(&format!("/v1/images/generations/{id}/classes"), &json!({ "prompt": 2 }));
    assert_eq!(status, 200, "{amended}");
    let first = amended["first_token"].as_u64().unwrap();
    assert!(first > 0 && first < 400, "{amended}");
    let image = events.last().unwrap().1;
    let course = format!("0:0-{first},2:{first}-");
    assert_eq!(amended["classes"], course);
    let same = json!({ "prompt": course, "seed": 4, "size": wide, "num_inference_steps": 4 });
    assert_eq!(file(&image), file(&service.generate(&same).1["data"][0]));
    let (status, gone) = service.post(&format!("/v1/images/generations/{id}/classes"), &json!({ "prompt": 2 }));
    assert_eq!((status, &gone["error"]["code"]), (404, &json!("image_not_found")));
}

#[test]
fn bad_requests_get_errors_in_the_envelope() {
    let place = place();
    let service = Service::start(&place, "--max-tokens 20");
    for (body, param, words) in [
        (json!({ "prompt": 99 }), "prompt", "prompt is 99"),
        (json!({ "prompt": "sea" }), "prompt", "prompt is sea"),
        (json!({ "prompt": "0:0-4" }), "prompt", "without a class"),
        (json!({ "prompt": 0, "n": 0 }), "n", "1 to 10"),
        (json!({ "prompt": 0, "n": 11 }), "n", "1 to 10"),
        (json!({ "prompt": 0, "size": "1024x1024" }), "size", "auto or WIDTHx"),
        (json!({ "prompt": 0, "size": "large" }), "size", "auto or WIDTHx"),
        (json!({ "prompt": 0, "num_inference_steps": 0 }), "num_inference_steps", "num_inference_steps is 0"),
        (json!({ "prompt": 0, "guidance_scale": -1 }), "guidance_scale", "guidance_scale is -1"),
        (json!({ "prompt": 0, "quality": "hd" }), "quality", "does not support"),
        (json!({ "prompt": 0, "style": "vivid" }), "style", "does not support"),
    ] {
        let (status, answer) = service.generate(&body);
        let error = &answer["error"];
        assert_eq!(
            (status, &error["param"], &error["type"]),
            (400, &json!(param), &json!("invalid_request_error")),
            "{body}"
        );
        assert!(error["message"].as_str().unwrap().contains(words), "{body}: {error}");
    }
    for body in
        [json!({}), json!({ "prompt": 0, "seed": -1 }), json!([]), json!({ "prompt": 0, "response_format": "url" })]
    {
        let (status, answer) = service.generate(&body);
        assert_eq!((status, &answer["error"]["code"]), (400, &json!("invalid_json")), "{body}");
    }
    let (status, answer) = service.generate(&json!({ "prompt": 0, "model": "dall-e-3" }));
    assert_eq!((status, &answer["error"]["code"]), (404, &json!("model_not_found")));
    let (status, answer) = service.get("/v1/other");
    assert!(status == 404 && answer.contains("not_found"), "{answer}");
    let (status, answer) = service.get("/v1/images/generations");
    assert!(status == 404 && answer.contains("no GET /v1/images/generations"), "{answer}");
    // The service closes the connection when it has read too much, so that the rest of a larger body could not be sent.
    let large = json!({ "prompt": "x".repeat(1 << 20) });
    let (status, answer) = service.generate(&large);
    assert_eq!((status, &answer["error"]["code"]), (413, &json!("body_too_large")));
}

#[test]
fn keys_are_needed_where_others_reach_the_service() {
    let place = place();
    place.write("keys.txt", "first-key\n\nsecond-key\n");
    place.write("none.txt", "\n");
    for flags in
        ["--host 0.0.0.0", "--api-key-file none.txt", "--engine bundle", "--engine =bundle", "--engine missing"]
    {
        place.refused(&format!("eqim-serve --engine bundle --port 0 {flags}"));
    }
    insta::assert_snapshot!(place.messages());
    let service = Service::start(&place, "--api-key-file keys.txt --host 0.0.0.0");
    let url = service.url.replace("0.0.0.0", "127.0.0.1");
    let status = |key: Option<&str>, path: &str| {
        let request = service.client.get(format!("{url}{path}"));
        let request = key.iter().fold(request, |request, key| request.header("Authorization", format!("Bearer {key}")));
        request.call().unwrap().status().as_u16()
    };
    for path in ["/v1/models", "/metrics"] {
        assert_eq!([None, Some("other"), Some("first-ke"), Some("")].map(|key| status(key, path)), [401; 4], "{path}");
        assert_eq!([Some("first-key"), Some("second-key")].map(|key| status(key, path)), [200; 2], "{path}");
    }
    assert_eq!(status(None, "/health/live"), 200);
}

#[test]
fn the_page_and_the_description_of_the_api_load_nothing_foreign() {
    let place = place();
    let service = Service::start(&place, "");
    let response = |path: &str| service.client.get(format!("{}{path}", service.url)).call().unwrap();
    for path in ["/", "/docs/"] {
        let mut response = response(path);
        let policy = response.headers()["content-security-policy"].to_str().unwrap().to_string();
        assert!(policy.starts_with("default-src 'none'; script-src 'self'; ") && !policy.contains("http"), "{policy}");
        assert!(response.headers()["content-type"].to_str().unwrap().starts_with("text/html"), "{path}");
        // Everything that the page names is there.
        let text = response.body_mut().read_to_string().unwrap();
        let names = text.split('"').skip(1).step_by(2).filter(|name| name.ends_with(".js") || name.ends_with(".css"));
        let names: Vec<&str> = names.map(|name| name.trim_start_matches("./")).collect();
        assert!(!names.is_empty(), "{text}");
        for name in names {
            assert_eq!(service.get(&format!("{path}{name}")).0, 200, "{path}{name}");
        }
    }
    let api: Value = serde_json::from_str(&service.get("/openapi.json").1).unwrap();
    let paths = api["paths"].as_object().unwrap();
    assert_eq!(paths.len(), 8);
    for (path, methods) in paths {
        for method in methods.as_object().unwrap().keys() {
            let url = format!("{}{}", service.url, path.replace("{id}", "bundle"));
            let answer = match method.as_str() {
                "get" => service.client.get(url).call(),
                _ => service.client.post(url).send_empty(),
            };
            let text = answer.unwrap().body_mut().read_to_string().unwrap();
            assert!(!text.contains("there is no"), "{method} {path}: {text}");
        }
    }
    // Every parameter of a request is described.
    let described = &api["components"]["schemas"]["Body"]["properties"];
    for name in ["prompt", "size", "seed", "guidance_scale", "num_inference_steps", "solver", "stream", "user"] {
        assert!(described[name].is_object(), "{name}: {described}");
    }
}

#[test]
fn only_named_origins_are_allowed() {
    let place = place();
    let service = Service::start(&place, "--cors-origin https://example.org");
    let allowed = |origin: &str| {
        let request = service.client.get(format!("{}/v1/models", service.url)).header("Origin", origin);
        let response = request.call().unwrap();
        response.headers().get("access-control-allow-origin").map(|value| value.to_str().unwrap().to_string())
    };
    assert_eq!(allowed("https://example.org").as_deref(), Some("https://example.org"));
    assert_eq!(allowed("https://example.com"), None);
    // A browser sends a form of any page, without asking the service before.
    let posted = |service: &Service, origin: &str| {
        let request = service.client.post(format!("{}/v1/images/generations", service.url)).header("Origin", origin);
        request.send_json(json!({ "prompt": 0, "num_inference_steps": 1 })).unwrap().status().as_u16()
    };
    assert_eq!([&service.url, "https://example.org"].map(|origin| posted(&service, origin)), [200; 2]);
    assert_eq!(["https://example.com", "null", "http://127.0.0.1:1"].map(|origin| posted(&service, origin)), [403; 3]);
    let closed = Service::start(&place, "");
    let request = closed.client.get(format!("{}/v1/models", closed.url)).header("Origin", "https://example.org");
    assert!(request.call().unwrap().headers().get("access-control-allow-origin").is_none());
}

#[test]
fn log_lines_have_the_identifier_of_their_request_and_no_secret() {
    let place = place();
    place.write("keys.txt", "a-secret-key\n");
    let service = Service::start(&place, "--log-json --api-key-file keys.txt");
    let request = service.client.post(format!("{}/v1/images/generations", service.url));
    let request = request.header("Authorization", "Bearer a-secret-key");
    let response = request.send_json(json!({ "prompt": 0, "user": "someone", "num_inference_steps": 1 })).unwrap();
    assert_eq!(response.status(), 200);
    let id = response.headers()["x-request-id"].to_str().unwrap().to_string();
    drop(service);
    let log = String::from_utf8(place.read("log.txt")).unwrap();
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let line = lines.iter().find(|line| line["fields"]["message"] == "answered").unwrap();
    assert_eq!((&line["span"]["id"], &line["fields"]["status"]), (&json!(id), &json!(200)));
    assert_eq!(line["span"]["route"], "/v1/images/generations");
    assert!(!log.contains("a-secret-key") && !log.contains("someone"), "{log}");
}

#[test]
fn a_full_queue_refuses_and_a_client_that_goes_away_makes_room() {
    let place = place();
    let service = Service::start(&place, "--max-batch 1 --max-queue 1 --max-tokens 100000");
    let endless = service.size(50_000);
    let body = json!({ "prompt": 0, "size": endless, "num_inference_steps": 50, "stream": true });
    let mut streams = [service.stream(&body), service.stream(&body)];
    assert_eq!(streams[0].next().unwrap().0, "image_generation.partial_image");
    let mut response = service
        .client
        .post(format!("{}/v1/images/generations", service.url))
        .send_json(json!({ "prompt": 0 }))
        .unwrap();
    assert_eq!((response.status().as_u16(), response.headers()["retry-after"].to_str().unwrap()), (429, "1"));
    let answer: Value = response.body_mut().read_json().unwrap();
    assert_eq!(answer["error"]["type"], "rate_limit_error");
    assert_eq!(service.metric("eqim_pending_images"), 2.0);
    drop(streams);
    service.wait("eqim_pending_images", 0.0);
    service.wait("eqim_batch_images", 0.0);
    assert_eq!(service.generate(&json!({ "prompt": 0, "num_inference_steps": 1 })).0, 200);
    assert_eq!(service.metric("eqim_images_total{model=\"bundle\",outcome=\"cancelled\"}"), 2.0);
}

#[test]
fn a_request_that_takes_too_long_is_cancelled() {
    let place = place();
    let service = Service::start(&place, "--request-timeout 1 --max-tokens 100000");
    let endless = service.size(50_000);
    let (status, answer) = service.generate(&json!({ "prompt": 0, "size": endless, "num_inference_steps": 50 }));
    assert_eq!((status, &answer["error"]["code"]), (504, &json!("timeout")));
    service.wait("eqim_pending_images", 0.0);
}

#[test]
fn what_runs_is_finished_at_the_end() {
    let place = place();
    let mut service = Service::start(&place, "");
    // A connection without a request does not hold up the end.
    let idle = std::net::TcpStream::connect(service.url.trim_start_matches("http://")).unwrap();
    let body = json!({ "prompt": 0, "num_inference_steps": 200, "stream": true, "n": 2, "guidance_scale": 2 });
    let events = service.stream(&body);
    service.terminate();
    let start = Instant::now();
    // The service no longer accepts connections, or refuses the request.
    while service.client.get(format!("{}/health/ready", service.url)).call().is_ok_and(|it| it.status() == 200) {
        assert!(start.elapsed() < PATIENCE);
    }
    let names: Vec<String> = events.map(|(name, _)| name).collect();
    assert_eq!(names.iter().filter(|name| *name == "image_generation.completed").count(), 2, "{names:?}");
    assert_eq!(service.ended().code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(20), "the service waited for a client that sends nothing");
    drop(idle);

    // An image that takes longer than the time for it is given up, and the exit code tells.
    let mut service = Service::start(&place, "--drain-timeout 1 --max-tokens 100000");
    let endless = service.size(50_000);
    let mut events =
        service.stream(&json!({ "prompt": 0, "size": endless, "num_inference_steps": 50, "stream": true }));
    events.next().unwrap();
    service.terminate();
    assert_eq!(service.ended().code(), Some(1));
}
