// SPDX-License-Identifier: Apache-2.0

// Package config reads the gateway's configuration file.
//
// One strict TOML file. bulkhead-gateway.toml beside this source is the manual:
// it shows every key with its default, and a test parses it. A key the gateway
// does not know is an error that names the file, the line and the nearest key
// it does know; nothing is ever ignored.
//
// The package only reads and checks. It opens no socket, makes no directory
// and loads no certificate.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// DefaultPath is where the packages put the file.
const DefaultPath = "/etc/bulkhead/bulkhead-gateway.toml"

// Config is the whole file after defaults and checks.
type Config struct {
	DataDir string    `toml:"data_dir"` // holds the ledger and its lock
	Listen  []Address `toml:"listen"`   // at least one
	TLS     TLS       `toml:"tls"`      // all three files are set if a listen address is tcp
	Log     Log       `toml:"log"`
}

// TLS is used by every tcp address. Both sides show certificates.
type TLS struct {
	CertFile     string   `toml:"cert_file"`
	KeyFile      string   `toml:"key_file"`
	ClientCAFile string   `toml:"client_ca_file"`
	Operators    []string `toml:"operators"` // certificate names that may query
}

// Log says how the gateway writes to standard error.
type Log struct {
	Format LogFormat  `toml:"format"`
	Level  slog.Level `toml:"level"`
}

// LogFormat is auto, json or text.
type LogFormat string

// Auto is text on a terminal and JSON elsewhere.
const (
	Auto LogFormat = "auto"
	JSON LogFormat = "json"
	Text LogFormat = "text"
)

// Address is where the gateway listens.
type Address struct {
	Network string // unix or tcp
	Addr    string // a path, or host:port
}

// String is the form that the file uses.
func (a Address) String() string { return a.Network + "://" + a.Addr }

// UnmarshalText implements [encoding.TextUnmarshaler].
func (a *Address) UnmarshalText(b []byte) error {
	network, addr, ok := strings.Cut(string(b), "://")
	switch {
	case ok && network == "unix":
		// 107 bytes and a NUL are all that a Linux socket address holds.
		if !filepath.IsAbs(addr) || len(addr) > 107 {
			return fmt.Errorf("listen %q: want an absolute path of at most 107 bytes after unix://", b)
		}
	case ok && network == "tcp":
		if _, err := netip.ParseAddrPort(addr); err != nil {
			return fmt.Errorf("listen %q: want an IP address and a port after tcp://, as in tcp://0.0.0.0:7443", b)
		}
	default:
		return fmt.Errorf("listen %q: want unix:///path or tcp://address:port", b)
	}
	*a = Address{Network: network, Addr: addr}
	return nil
}

// Default is the configuration of an empty file.
func Default() Config {
	return Config{
		DataDir: "/var/lib/bulkhead-gateway",
		Listen:  []Address{{Network: "unix", Addr: "/run/bulkhead-gateway/gateway.sock"}},
		Log:     Log{Format: Auto, Level: slog.LevelInfo},
	}
}

// Error is a file that cannot be used. Line is 0 if no single line is to blame.
type Error struct {
	File string
	Line int
	Msg  string
}

func (e *Error) Error() string {
	if e.Line == 0 {
		return fmt.Sprintf("%s: %s", e.File, e.Msg)
	}
	return fmt.Sprintf("%s:%d: %s", e.File, e.Line, e.Msg)
}

// Load reads and checks the file at path. Every error is an [*Error].
func Load(path string) (Config, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return Config{}, &Error{File: path, Msg: errors.Unwrap(err).Error()}
	}
	return Parse(path, data)
}

// Parse is Load for bytes that are already in memory; file only names them.
func Parse(file string, data []byte) (Config, error) {
	cfg := Default()
	dec := toml.NewDecoder(bytes.NewReader(data)).DisallowUnknownFields()
	if err := dec.Decode(&cfg); err != nil {
		return Config{}, decodeError(file, err)
	}
	if err := cfg.check(); err != nil {
		return Config{}, &Error{File: file, Msg: err.Error()}
	}
	return cfg, nil
}

func (c Config) check() error {
	if !filepath.IsAbs(c.DataDir) {
		return fmt.Errorf("data_dir %q: want an absolute path", c.DataDir)
	}
	if len(c.Listen) == 0 {
		return errors.New("listen: want at least one address")
	}
	tcp := false
	seen := map[Address]bool{}
	for _, a := range c.Listen {
		if seen[a] {
			return fmt.Errorf("listen: %s is there twice", a)
		}
		seen[a] = true
		tcp = tcp || a.Network == "tcp"
	}
	files := []struct{ key, path string }{
		{"cert_file", c.TLS.CertFile},
		{"key_file", c.TLS.KeyFile},
		{"client_ca_file", c.TLS.ClientCAFile},
	}
	for _, f := range files {
		if f.path == "" && tcp {
			return fmt.Errorf("tls.%s: a tcp address needs it; nodes are known by their certificates", f.key)
		}
		if f.path != "" && !filepath.IsAbs(f.path) {
			return fmt.Errorf("tls.%s %q: want an absolute path", f.key, f.path)
		}
	}
	switch c.Log.Format {
	case Auto, JSON, Text:
	default:
		return fmt.Errorf("log.format %q: want auto, json or text", c.Log.Format)
	}
	for _, name := range c.TLS.Operators {
		if name == "" {
			return errors.New("tls.operators: want names, not an empty string")
		}
	}
	return nil
}
