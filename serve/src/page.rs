//! The page at `/`. Its files are parts of the program.

use axum::Router;
use axum::extract::Request;
use axum::http::{HeaderValue, header};
use axum::middleware::Next;
use axum::response::Response;
use axum::routing::get;

/// What the page may load and do: only what comes from this service.
const OWN: &str = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; \
                   connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'";
/// The same for the description of the API: Swagger UI sets styles of elements.
const OWN_WITH_STYLES: &str = "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; \
                               img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; \
                               frame-ancestors 'none'";

/// Media types of the files.
const HTML: &str = "text/html; charset=utf-8";
const SCRIPT: &str = "text/javascript; charset=utf-8";
const STYLE: &str = "text/css; charset=utf-8";
const ICON: &str = "image/svg+xml";

/// Path, media type and contents of a file that the page loads.
macro_rules! part {
    ($name:literal, $kind:ident) => {
        (concat!("/page/", $name), $kind, include_str!(concat!("../web/", $name)))
    };
}

/// The files of the page.
const FILES: [(&str, &str, &str); 14] = [
    ("/", HTML, include_str!("../web/index.html")),
    part!("style.css", STYLE),
    part!("icon.svg", ICON),
    part!("classes.js", SCRIPT),
    part!("controls.js", SCRIPT),
    part!("elements.js", SCRIPT),
    part!("events.js", SCRIPT),
    part!("landscape.js", SCRIPT),
    part!("link.js", SCRIPT),
    part!("main.js", SCRIPT),
    part!("photograph.js", SCRIPT),
    part!("source.js", SCRIPT),
    part!("status.js", SCRIPT),
    part!("view.js", SCRIPT),
];

/// The routes of the page.
pub fn router<S: Clone + Send + Sync + 'static>() -> Router<S> {
    let file = |router: Router<S>, (path, kind, text): (&str, &'static str, &'static str)| {
        let headers = [
            (header::CONTENT_TYPE, kind),
            (header::CACHE_CONTROL, "no-cache"),
            (header::CONTENT_SECURITY_POLICY, OWN),
            (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (header::REFERRER_POLICY, "no-referrer"),
        ];
        router.route(path, get(move || async move { (headers, text) }))
    };
    FILES.into_iter().fold(Router::new(), file)
}

/// Adds the policy of the description of the API to a response.
pub async fn described(request: Request, next: Next) -> Response {
    let mut response = next.run(request).await;
    response.headers_mut().insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(OWN_WITH_STYLES));
    response
}
