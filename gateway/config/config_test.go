// SPDX-License-Identifier: Apache-2.0

package config

import (
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
)

const sample = "bulkhead-gateway.toml"

func TestSampleFileIsTheDefaults(t *testing.T) {
	got, err := Load(sample)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(Default(), got, cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("the sample differs from the defaults (-want +got):\n%s", diff)
	}
}

func TestSampleFileNamesEveryKey(t *testing.T) {
	data, err := os.ReadFile(sample)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range keys(reflect.TypeFor[Config](), "") {
		want := last(key) + " ="
		if reflectTable(key) {
			want = "[" + key + "]"
		}
		found := false
		for line := range strings.Lines(string(data)) {
			found = found || strings.HasPrefix(strings.TrimPrefix(line, "# "), want)
		}
		if !found {
			t.Errorf("the sample has no line %q", want)
		}
	}
}

func reflectTable(key string) bool { return key == "tls" || key == "log" }

// The commented keys of the sample must parse as well.
func TestSampleFileUncommented(t *testing.T) {
	data, err := os.ReadFile(sample)
	if err != nil {
		t.Fatal(err)
	}
	text := strings.NewReplacer("# cert_file", "cert_file", "# key_file", "key_file",
		"# client_ca_file", "client_ca_file").Replace(string(data))
	cfg, err := Parse(sample, []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	if cfg.TLS.CertFile == "" || cfg.TLS.KeyFile == "" || cfg.TLS.ClientCAFile == "" {
		t.Errorf("got %+v, want all files set", cfg.TLS)
	}
}

func TestParse(t *testing.T) {
	got, err := Parse("f.toml", []byte(`
data_dir = "/srv/gw"
listen = ["unix:///run/gw.sock", "tcp://[::]:7443"]
tls = {cert_file = "/c", key_file = "/k", client_ca_file = "/ca", operators = ["ops"]}
log = {format = "json", level = "debug"}
`))
	if err != nil {
		t.Fatal(err)
	}
	want := Config{
		DataDir: "/srv/gw",
		Listen:  []Address{{"unix", "/run/gw.sock"}, {"tcp", "[::]:7443"}},
		TLS:     TLS{CertFile: "/c", KeyFile: "/k", ClientCAFile: "/ca", Operators: []string{"ops"}},
		Log:     Log{Format: JSON, Level: slog.LevelDebug},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestParseErrors(t *testing.T) {
	tests := map[string]struct{ text, want string }{
		"unknown key":       {"\nlisen = []\n", `f.toml:2: unknown key "lisen"; did you mean "listen"?`},
		"unknown in table":  {"[tls]\n\ncert_fle = \"/x\"\n", `f.toml:3: unknown key "tls.cert_fle"; did you mean "tls.cert_file"?`},
		"wrong table":       {"key_file = \"/x\"\n", `f.toml:1: unknown key "key_file"; did you mean "tls.key_file"?`},
		"nothing near":      {"colour = 1\n", `f.toml:1: unknown key "colour"`},
		"unknown table":     {"[lgo]\nlevel = \"info\"\n", `f.toml:1: unknown key "lgo"; did you mean "log"?`},
		"syntax":            {"data_dir = \n", `f.toml:1: `},
		"wrong type":        {"\ndata_dir = 3\n", `f.toml:2: `},
		"duplicate key":     {"data_dir = \"/a\"\ndata_dir = \"/b\"\n", `f.toml:2: `},
		"relative data_dir": {`data_dir = "x"`, `f.toml: data_dir "x": want an absolute path`},
		"no listen":         {`listen = []`, `f.toml: listen: want at least one address`},
		"listen twice":      {`listen = ["unix:///a", "unix:///a"]`, `f.toml: listen: unix:///a is there twice`},
		"listen scheme":     {"\n\nlisten = [\"http://x\"]", `f.toml:3: listen "http://x": want unix:///path or tcp://address:port`},
		"listen relative":   {`listen = ["unix://a"]`, `f.toml:1: listen "unix://a": want an absolute path`},
		"listen long":       {`listen = ["unix:///` + strings.Repeat("a", 107) + `"]`, `at most 107 bytes`},
		"listen port":       {`listen = ["tcp://1.2.3.4"]`, `f.toml:1: listen "tcp://1.2.3.4": want an IP address and a port`},
		"tcp without tls":   {`listen = ["tcp://1.2.3.4:5"]`, `f.toml: tls.cert_file: a tcp address needs it`},
		"tcp without ca":    {"listen = [\"tcp://1.2.3.4:5\"]\n[tls]\ncert_file=\"/c\"\nkey_file=\"/k\"", `f.toml: tls.client_ca_file: a tcp address needs it`},
		"relative cert":     {"[tls]\ncert_file = \"c\"", `f.toml: tls.cert_file "c": want an absolute path`},
		"empty operator":    {"[tls]\noperators = [\"\"]", `f.toml: tls.operators: want names`},
		"log format":        {"[log]\nformat = \"xml\"", `f.toml: log.format "xml": want auto, json or text`},
		"log level":         {"[log]\nlevel = \"loud\"", `f.toml:2: `},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			_, err := Parse("f.toml", []byte(tt.text))
			if err == nil {
				t.Fatalf("got no error, want %q", tt.want)
			}
			if _, ok := err.(*Error); !ok {
				t.Errorf("got %T, want *Error", err)
			}
			if got := err.Error(); !strings.Contains(got, tt.want) || strings.Contains(got, "\n") {
				t.Errorf("got %q, want %q in one line", got, tt.want)
			}
		})
	}
}

func TestLoadNoFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "none.toml")
	_, err := Load(path)
	if got, want := err.Error(), path+": no such file or directory"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func FuzzParse(f *testing.F) {
	data, err := os.ReadFile(sample)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add([]byte("[tls]\ncert_fle = 1"))
	f.Fuzz(func(t *testing.T, data []byte) {
		cfg, err := Parse("f", data)
		if err == nil && (len(cfg.Listen) == 0 || cfg.DataDir == "") {
			t.Errorf("accepted %+v", cfg)
		}
	})
}
